"""Refines clips with stock pipelines of every family, by the pipeline's own call.

Wan is driven step by step (`diffaccel.pipelines.video.freeswim`). The others run as they are:
their schedule begins part of the way (`diffaccel.pipelines.redraw.late_start`), windows hold
self-attention to native size, and what is where comes from a second path with full attention
where text is cross-attended, and from the low frequencies of the smaller clip where it is joint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import denoisers, set_attn_processor
from diffaccel.attach.report import Report
from diffaccel.bindings import ModelCall, binding_of
from diffaccel.guidance.guide import on_batch, with_prediction
from diffaccel.pipelines.image.low_frequency import (
    Arrangement,
    LowFrequencyGuidance,
    guided_scheduler,
)
from diffaccel.pipelines.redraw.late_start import pixels_of, started_from, starting_late
from diffaccel.pipelines.video.dual_path import DualPath
from diffaccel.pipelines.video.run import Clip, run_clip
from diffaccel.pipelines.video.wan import shifted_scheduler
from diffaccel.pipelines.windows import throughout

if TYPE_CHECKING:
    from diffaccel.pipelines.redraw.latents import LatentCodec
    from diffaccel.pipelines.video.families import VideoFamily
    from diffaccel.pipelines.video.freeswim import FreeSwim

LEVELS = 2
"""Low frequencies of a clip are means over 2 ** LEVELS latent elements along rows and columns."""


def refine_with(
    pipe: Any, call: dict[str, Any], clip: Clip, size: tuple[int, int], recipe: FreeSwim,
    family: VideoFamily, on_step: Callable[[], None] = lambda: None,
) -> tuple[Clip, dict[str, Report]]:  # fmt: skip
    """Refines a clip at a larger size.

    Args:
        pipe: A stock pipeline that makes its latents in `prepare_latents`.
        call: Arguments of its call, but for size and steps.
        clip: What is refined; its sound, if it has one, is redrawn as much as its frames.
        size: (width, height) in pixels.
        recipe: How.
        family: How the pipeline is called.
        on_step: Called after each step.

    Returns:
        The clip, and what the windows did.

    Raises:
        InputError: The scheduler cannot noise a clip or, for models of joint attention, cannot be
            guided.
    """
    codec = codec_of(pipe, family)
    clean = codec.encode(pipe.vae, pixels_of(clip.frames.transpose(1, 2), size))
    if "image" in call:
        clean = clean[:, :, family.given_frames :]
    with LedAttention(pipe, recipe) as attention:

        def step_done() -> None:
            attention.next_step()
            on_step()

        scheduler = refining_scheduler(pipe, recipe, codec, clean, step_done)
        with started_from(pipe, scheduler, clean, codec, clip.sound):
            sides = {"width": size[0], "height": size[1], "num_inference_steps": recipe.steps}
            refined = run_clip(pipe, call | sides)
        return refined, attention.report()


def codec_of(pipe: Any, family: VideoFamily) -> LatentCodec:
    """How a pipeline holds latents; the scheduler of Cosmos says how large they are."""
    scale = pipe.scheduler.config.get("sigma_data")
    return family.codec if scale is None else replace(family.codec, scale=scale)


def refining_scheduler(
    pipe: Any, recipe: FreeSwim, codec: LatentCodec, clean: Tensor, on_step: Callable[[], None]
) -> Any:
    """Returns the scheduler of a refinement: shifted, guided where text is joint, and late."""
    scheduler = pipe.scheduler
    config = scheduler.config
    if "shift" in config or config.get("use_flow_sigmas"):
        scheduler = shifted_scheduler(pipe, recipe.shift)
    model = next(iter(denoisers(pipe).values()))
    if not binding_of(model).text_layers(model):
        settings = dict(scheduler.config)
        settings.pop("_use_default_values", None)  # diffusers would put the defaults back
        scheduler = guided_scheduler(scheduler, settings, 1.0, LEVELS)
    late = starting_late(scheduler, recipe.strength, on_step)
    if isinstance(late, LowFrequencyGuidance):
        late.arrangement = Arrangement(codec, model, clean)
    return late


class LedAttention:
    """Holds attention to windows, led by a full path where text is cross-attended.

    A context manager.

    Args:
        pipe: The pipeline.
        recipe: The windows, and in which steps the full path runs.
    """

    def __init__(self, pipe: Any, recipe: FreeSwim) -> None:
        self._pipe, self._recipe = pipe, recipe
        self._calls: list[_LedCalls] = []
        self._sources: dict[str, Any] = {}

    def __enter__(self) -> LedAttention:
        every, method = self._recipe.guide_every, self._recipe.method
        with ExitStack() as stack:
            for name, model in denoisers(self._pipe).items():
                if binding_of(model).text_layers(model) and every is not None:
                    path = DualPath(model, method, self._recipe.cache)
                    self._sources[name] = stack.enter_context(path)
                    self._calls.append(stack.enter_context(_LedCalls(model, path, every)))
                else:
                    self._sources[name] = stack.enter_context(
                        set_attn_processor(model, throughout(method), always=True)
                    )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def next_step(self) -> None:
        """Says that a denoising step is done."""
        for calls in self._calls:
            calls.next_step()

    def report(self) -> dict[str, Report]:
        """Returns what the windows did, by the name of the denoiser."""
        return {name: source.report() for name, source in self._sources.items()}


class _LedCalls:
    """Hooks around the calls of a denoiser; those of one step are told apart by their order."""

    def __init__(self, model: nn.Module, path: DualPath, every: int) -> None:
        self._model, self._path, self._every = model, path, every
        self._step = self._call = self._rows = 0

    def __enter__(self) -> _LedCalls:
        self._handles = (
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def next_step(self) -> None:
        self._step, self._call = self._step + 1, 0

    def _before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = ModelCall.of(model, args, kwargs, {}).arguments
        call.pop("self")
        prompt = f"call {self._call}"
        self._call += 1
        if self._step % self._every:
            self._path.begin("reuse", prompt)
            return (), call
        self._path.begin("guide", prompt)
        self._rows = len(call[binding_of(model).latents])
        doubled = on_batch(call, self._rows, lambda t: torch.cat([t, t]))
        text = call.get("encoder_hidden_states")
        if isinstance(text, Tensor) and len(text) > self._rows:  # AnimateDiff: for each frame
            doubled["encoder_hidden_states"] = torch.cat([text, text])
        return (), doubled

    def _after(self, model: Any, args: tuple, output: Any) -> Any:
        is_doubled = self._path.mode == "guide"
        self._path.end()
        if not is_doubled:
            return output
        if isinstance(output, tuple):  # the sound of LTX-2 too
            return on_batch(output, 2 * self._rows, lambda t: t[: self._rows])
        return with_prediction(output, output[0][: self._rows])
