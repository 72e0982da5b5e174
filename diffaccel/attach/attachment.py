"""Attaching a method to diffusers pipelines and models, and taking it off again."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from diffaccel.attach.call import AttentionHook
from diffaccel.attach.method_state import MethodState
from diffaccel.attach.processor import (
    attached,
    attached_layer,
    redirected,
    unattached,
    why_opaque,
)
from diffaccel.attach.report import Report
from diffaccel.attach.running import refuse_running
from diffaccel.attach.seam import AttachedLayer
from diffaccel.attach.state import DenoiserState, state_of
from diffaccel.attach.step_clock import StepClock
from diffaccel.bindings import (
    REFUSED,
    AttentionLayer,
    UnsupportedModelError,
    binding_of,
    processor_modules,
    set_processor,
)
from diffaccel.errors import ModelError
from diffaccel.methods.base import Method

DENOISERS = (
    "transformer",
    "transformer_2",
    "transformer_ref",
    "unconditional_transformer",
    "unet",
    "image_unet",
    "diffusion_decoder",
)
"""Pipeline components that a method is attached to: never the VAE, text encoders, controlnets."""

STAGES = ("prior_prior", "prior", "decoder")
"""Denoisers of pipelines in several stages, where no component has a name of `DENOISERS`."""


class Attachment:
    """A method attached to the denoisers of a pipeline, or to one model.

    As a context manager it is removed on exit. The latest run of each denoiser can be reported.

    Example:
        >>> with pipe.set_attn_processor(RectifiedSpaAttn()) as attachment:
        ...     image = pipe("a red apple").images[0]
        >>> print(attachment.report())
    """

    def __init__(self, denoisers: dict[str, nn.Module], methods: dict[str, MethodState]) -> None:
        self._denoisers = denoisers
        self._methods = methods

    def report(self) -> Report:
        """Returns which layers got the method, which did not, and what the latest run did.

        Waits for the device.
        """
        return Report(
            tuple(
                self._methods[name].report(name, type(model).__name__, self._skipped(name, model))
                for name, model in self._denoisers.items()
            )
        )

    def reset(self) -> None:
        """Forgets the latest run; the next model call begins a new one."""
        for method in self._methods.values():
            method.reset()

    def remove(self) -> None:
        """Puts the models' own processors back; does nothing where that was done already.

        Raises:
            ModelError: A denoiser, or a pipeline that holds it, runs in another thread.
        """
        refuse_running(self._denoisers.values())
        for name, model in self._denoisers.items():
            state = state_of(model)
            # Another method may have been set since: that one stays.
            if state is not None and state.method is self._methods[name]:
                remove_method(model)

    def _skipped(self, name: str, model: nn.Module) -> dict[str, str]:
        """Returns why attention layers that the method does not serve keep their own."""
        skipped = binding_of(model).skipped(model)
        state = state_of(model)
        if state is None or state.method is not self._methods[name]:
            return skipped
        return skipped | state.lost(model)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def set_attn_processor(
    target: Any, method: Method, *, always: bool = False, check: bool = False
) -> Attachment:
    """Makes the denoisers of a pipeline compute their visual self-attention with a method.

    The models keep their own attention processors; only the attention kernel is replaced.
    Cross-attention, VAE, text encoders and controlnets stay as they are. A method that was set
    before is replaced. Under torch.compile the attention of attached layers is one opaque
    operation, so that whole graphs (fullgraph=True) stay whole. Where gradients are needed, as in
    training, layers run dense, and the report says so.

    Args:
        target: A diffusers pipeline, or a denoiser itself. A denoiser alone does not tell
            everything about its family (Wan 2.2 looks like Wan 2.1), so prefer the pipeline.
        method: What to compute, such as `RectifiedSpaAttn(drop=0.8)`.
        always: Whether the method runs even where `diffaccel.attach.forecast` expects dense
            attention to be faster. Otherwise such calls run dense, and the report says so.
        check: Whether each attention call of an attached layer raises a `ModelError` that names
            step and layer where its output has NaN or infinity, and says whether its inputs had
            them. To find where a picture turns black; waits for the device in each call.

    Returns:
        The attachment: reports, removes, works as a context manager.

    Raises:
        TypeError: The method is not a method, or the target neither pipeline nor model.
        UnsupportedModelError: No binding knows the model, or the pipeline has no denoiser.
        ModelError: A denoiser, or a pipeline that holds it, runs in another thread.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an attention method, got {_described(method)}; "
            "pass an instance such as diffaccel.RectifiedSpaAttn()"
        )
    models = denoisers(target)
    refuse_running(models.values())
    pipe = None if isinstance(target, nn.Module) else target
    methods = {
        name: _method_state(name, model, pipe, method, always) for name, model in models.items()
    }
    for method_state in methods.values():
        method_state.check = check
    for name, model in models.items():
        # Processors that are attached already stay: compiled graphs hold for the new method too.
        state = attach(model, tuple(layer.name for layer in methods[name].layers))
        state.exchange_method(methods[name])
    return Attachment(models, methods)


def restore_attn_processor(target: Any) -> None:
    """Puts the denoisers' own attention processors back; does nothing where none was replaced.

    Args:
        target: A diffusers pipeline, or a denoiser itself.

    Raises:
        ModelError: A denoiser, or a pipeline that holds it, runs in another thread.
    """
    models = denoisers(target)
    refuse_running(models.values())
    for model in models.values():
        remove_method(model)


def denoisers(target: Any) -> dict[str, nn.Module]:
    """Returns the denoisers of a pipeline by component name, or a bare model under ""."""
    if isinstance(target, nn.Module):
        return {"": _uncompiled(target)}
    if not isinstance(target, (DiffusionPipeline, ModularPipeline)):
        raise TypeError(f"target must be a diffusers pipeline or model, got {_described(target)}")
    found: dict[str, nn.Module] = {}
    for names in (DENOISERS, STAGES):
        components = {name: getattr(target, name, None) for name in names}
        found = found or {
            name: _uncompiled(model)
            for name, model in components.items()
            if isinstance(model, nn.Module)
        }
    # Beside a denoiser that can be served there may be one that cannot, as a prior of embeddings.
    served = {name: model for name, model in found.items() if type(model).__name__ not in REFUSED}
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoiser to attach to (looked for "
            f"{', '.join((*DENOISERS, *STAGES))}); `diffaccel info --models` lists the classes "
            "that methods serve"
        )
    return served or found


def attach(model: nn.Module, names: tuple[str, ...]) -> DenoiserState:
    """Makes layers of a denoiser ask its state for their attention, and returns that state.

    Does nothing to layers that are attached already.

    Args:
        model: The denoiser.
        names: Paths of attention layers, self- or cross-attention.
    """
    state = state_of(model)
    if state is None:
        binding = binding_of(model)
        state = DenoiserState(binding, binding.layers(model))
        state.root_hooks = (
            model.register_forward_pre_hook(state.begin_call, with_kwargs=True),
            model.register_forward_hook(state.end_call, always_call=True),
        )
    layers = {layer.name: layer for layer in state.layers}
    for name in names:
        module: Any = model.get_submodule(name)
        if attached_layer(module.processor) is None:
            layer = layers.get(name) or AttentionLayer(name, "cross", len(layers))
            stock = unattached(module.processor)
            set_processor(module, attached(AttachedLayer(stock, layer, state)))
    return state


def detach_idle(model: nn.Module) -> None:
    """Puts the stock processors back on layers at which nothing acts any more."""
    state = state_of(model)
    if state is None:
        return
    served = {layer.name for layer in state.layers} if state.method is not None else set()
    busy = served | state.hooks.keys()
    module: Any
    for name, module in processor_modules(model):
        if name not in busy:
            # A processor that the user has set since stays.
            layer = attached_layer(module.processor)
            stock = unattached(module.processor) if layer is None else layer.stock
            if stock is not module.processor:
                set_processor(module, stock)
    if not busy:
        for handle in state.root_hooks:
            handle.remove()


def remove_method(model: nn.Module) -> None:
    """Takes the method of a denoiser off; does nothing where it has none."""
    state = state_of(model)
    if state is not None:
        state.exchange_method(None)
        detach_idle(model)


def add_attention_hook(model: nn.Module, hook: AttentionHook, names: tuple[str, ...]) -> None:
    """Lets a hook act at the attention of some layers, beside a method and other hooks."""
    attach(model, names).add_hook(hook, names)


def check_hookable(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises ModelError where a layer's processor lets no hook act at its attention."""
    module: Any
    for name in names:
        module = model.get_submodule(name)
        layer = attached_layer(module.processor)
        stock = unattached(module.processor) if layer is None else layer.stock
        if redirected(type(stock).__call__) is None:
            raise ModelError(f"attention of {name} cannot be changed: {why_opaque(stock)}")


def check_hooked(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises ModelError where a layer's processor was replaced after a hook was added."""
    module: Any
    for name in names:
        module = model.get_submodule(name)
        if attached_layer(module.processor) is None:
            raise ModelError(
                f"guidance no longer acts at {name} of {type(model).__name__}, whose processor "
                "was replaced after it was set; call set_guidance again"
            )


def remove_attention_hook(model: nn.Module, hook: AttentionHook) -> None:
    """Takes a hook off all layers of a denoiser; does nothing where it is on none."""
    state = state_of(model)
    if state is not None:
        state.remove_hook(hook)
        detach_idle(model)


def _method_state(
    name: str, model: nn.Module, pipe: Any, method: Method, always: bool
) -> MethodState:
    binding = binding_of(model)
    layers = binding.layers(model)
    for layer in layers:
        if isinstance(model.get_submodule(layer.name).processor, Method):
            raise TypeError(
                f"{layer.name} of {type(model).__name__} has a method as its processor, so its "
                "own processor is lost; load the model again, then call "
                "diffaccel.set_attn_processor(model, method)"
            )
    if not layers:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no layer of self-attention over visual tokens that "
            f"the patterns of {type(binding).__name__} match; where layers have other names, "
            "write a binding with patterns of their own: "
            f'diffaccel.bindings.BINDINGS["{type(model).__name__}"] = YourBinding()'
        )
    family = binding.family(model, pipe)
    expert = 1 if name == "transformer_2" else 0
    return MethodState(method, layers, StepClock(pipe), family, always, expert)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module inside a torch.compile wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
