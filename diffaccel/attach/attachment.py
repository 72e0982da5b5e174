"""Attaching a method to diffusers pipelines and models, and taking it off again."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from diffaccel.attach.processor import attached, stock_of
from diffaccel.attach.report import Report
from diffaccel.attach.state import Run, run_of
from diffaccel.attach.step_clock import StepClock
from diffaccel.bindings import BINDINGS, UnsupportedModelError, binding_of
from diffaccel.methods.base import Method

DENOISERS = ("transformer", "transformer_2", "unet")
"""Pipeline components that a method is attached to: never the VAE, text encoders, controlnets."""


class Attachment:
    """A method attached to the denoisers of a pipeline, or to one model.

    As a context manager it is removed on exit. The latest run of each denoiser can be reported.

    Example:
        >>> with pipe.set_attn_processor(RectifiedSpaAttn()) as attachment:
        ...     image = pipe("a red apple").images[0]
        >>> print(attachment.report())
    """

    def __init__(self, denoisers: dict[str, nn.Module], runs: dict[str, Run]) -> None:
        self._denoisers = denoisers
        self._runs = runs

    def report(self) -> Report:
        """Returns which layers got the method, which did not, and what the latest run did.

        Waits for the device.
        """
        return Report(
            tuple(
                run.report(name, model, _replaced_since(model, run))
                for (name, model), run in zip(
                    self._denoisers.items(), self._runs.values(), strict=True
                )
            )
        )

    def reset(self) -> None:
        """Forgets the latest run; the next model call begins a new one."""
        for run in self._runs.values():
            run.reset()

    def remove(self) -> None:
        """Puts the models' own processors back; does nothing where that was done already."""
        for name, model in self._denoisers.items():
            # Another method may have been set since: that one stays.
            if run_of(model) is self._runs[name]:
                _detach(model)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def set_attn_processor(target: Any, method: Method, *, always: bool = False) -> Attachment:
    """Makes the denoisers of a pipeline compute their visual self-attention with a method.

    The models keep their own attention processors; only the attention kernel is replaced.
    Cross-attention, VAE, text encoders and controlnets stay as they are. A method that was set
    before is replaced. Under torch.compile the attached layers run eagerly between compiled
    parts, so that fullgraph=True is not possible.

    Args:
        target: A diffusers pipeline, or a denoiser itself. A denoiser alone does not tell
            everything about its family (Wan 2.2 looks like Wan 2.1), so prefer the pipeline.
        method: What to compute, such as `RectifiedSpaAttn(drop=0.8)`.
        always: Whether the method runs even where `diffaccel.attach.forecast` expects dense attention to
            be faster. Otherwise such calls run dense, and the report says so.

    Returns:
        The attachment: reports, removes, works as a context manager.

    Raises:
        TypeError: The method is not a method, or the target neither pipeline nor model.
        UnsupportedModelError: No binding knows the model, or the pipeline has no denoiser.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an attention method, got {_described(method)}; "
            "pass an instance such as diffaccel.RectifiedSpaAttn()"
        )
    models = denoisers(target)
    pipe = None if isinstance(target, nn.Module) else target
    runs = {name: _new_run(name, model, pipe, method, always) for name, model in models.items()}
    for name, model in models.items():
        _detach(model)
        _attach(model, runs[name])
    return Attachment(models, runs)


def restore_attn_processor(target: Any) -> None:
    """Puts the denoisers' own attention processors back; does nothing where none was replaced.

    Args:
        target: A diffusers pipeline, or a denoiser itself.
    """
    for model in denoisers(target).values():
        _detach(model)


def denoisers(target: Any) -> dict[str, nn.Module]:
    """Returns the denoisers of a pipeline by component name, or a bare model under ""."""
    if isinstance(target, nn.Module):
        return {"": _uncompiled(target)}
    if not isinstance(target, (DiffusionPipeline, ModularPipeline)):
        raise TypeError(f"target must be a diffusers pipeline or model, got {_described(target)}")
    components = {name: getattr(target, name, None) for name in DENOISERS}
    found = {
        name: _uncompiled(model)
        for name, model in components.items()
        if isinstance(model, nn.Module)
    }
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoiser to attach to (looked for "
            f"{', '.join(DENOISERS)}); supported denoisers are {', '.join(BINDINGS)}"
        )
    return found


def _new_run(name: str, model: nn.Module, pipe: Any, method: Method, always: bool) -> Run:
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
            f"this {type(model).__name__} has no self-attention over visual tokens"
        )
    family = binding.family(model, pipe)
    expert = 1 if name == "transformer_2" else 0
    resolved = method.resolved(family, len(layers), expert)
    return Run(resolved, binding, layers, StepClock(pipe), family, always)


def _attach(model: nn.Module, run: Run) -> None:
    for layer in run.layers:
        module = model.get_submodule(layer.name)
        module.set_processor(attached(module.processor, layer, run))
    run.handle = model.register_forward_pre_hook(run.begin_call, with_kwargs=True)


def _detach(model: nn.Module) -> None:
    run = run_of(model)
    if run is None:
        return
    run.handle.remove()
    for layer in run.layers:
        module = model.get_submodule(layer.name)
        stock = stock_of(module.processor)
        # A processor that the user has set since stays.
        if stock is not None:
            module.set_processor(stock)


def _replaced_since(model: nn.Module, run: Run) -> list[str]:
    """Returns the layers that got another processor after the method was attached."""
    if run_of(model) is not run:
        return []
    names = [layer.name for layer in run.layers]
    return [name for name in names if stock_of(model.get_submodule(name).processor) is None]


def _uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module inside a torch.compile wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
