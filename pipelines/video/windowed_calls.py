"""Windows along time inside of the calls of a stock pipeline's denoiser.

The pipeline denoises all frames; the denoiser sees one window of native length after the other,
each at the first positions, which it knows, and what it says about frames that windows share is
averaged (`diffaccel.pipelines.video.long_video`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.attach.caches import caches_of, refuse_caches
from diffaccel.bindings import ModelCall, binding_of
from diffaccel.bindings.exchange import exchanged
from diffaccel.guidance.guide import with_prediction
from diffaccel.pipelines.video.long_video import TimeWindows


class WindowedCalls:
    """Makes a denoiser see windows along time. A context manager.

    Args:
        model: A denoiser of clips.
        windows: How clips are cut.
        axis: Axis of the latents along which frames lie; None for packed tokens, whose call says
            how many frames there are.

    Raises:
        ModelError: A cache acts on the denoiser.
    """

    def __init__(self, model: nn.Module, windows: TimeWindows, axis: int | None) -> None:
        self._model, self._windows, self._axis = model, windows, axis
        self._latents = binding_of(model).latents
        self._step, self._time = -1, float("nan")
        refuse_caches(model, "windows take turns in the calls", caches_of(model))

    def __enter__(self) -> WindowedCalls:
        self._forward = self._model.forward
        self._exchange = exchanged(self._model, "forward", self._windowed)
        self._exchange.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exchange.__exit__(*exception)

    def _windowed(self, *args: Any, **kwargs: Any) -> Any:
        call = ModelCall.of(self._model, args, kwargs, {}).arguments
        call.pop("self", None)
        time = float(torch.as_tensor(call["timestep"]).max())
        self._step, self._time = self._step + (time != self._time), time
        frames = self._frames(call)
        if frames <= self._windows.length:
            return self._forward(**call)
        total: Any = None
        for window, weights in self._windows.weights(frames, self._step):
            output = self._forward(**self._part(call, frames, window))
            part = self._by_frames(
                output if isinstance(output, Tensor) else output[0], len(weights)
            )
            if total is None:
                shape = list(part.shape)
                shape[self._frame_axis] = frames
                total = part.new_zeros(shape, dtype=torch.float32)
            spread = weights.view(-1, *(1,) * (part.ndim - self._frame_axis - 1)).to(part.device)
            total.narrow(self._frame_axis, window.start, len(weights)).add_(part.float() * spread)
        dtype = call[self._latents].dtype
        prediction = total.to(dtype) if self._axis is not None else total.flatten(1, 2).to(dtype)
        return with_prediction(output, prediction)

    @property
    def _frame_axis(self) -> int:
        return 1 if self._axis is None else self._axis

    def _frames(self, call: dict[str, Any]) -> int:
        """Latent frames of a call."""
        return call["num_frames"] if self._axis is None else call[self._latents].shape[self._axis]

    def _by_frames(self, tensor: Tensor, frames: int) -> Tensor:
        """Gives packed tokens (B, N, C) an axis of frames."""
        return tensor.unflatten(1, (frames, -1)) if self._axis is None else tensor

    def _part(self, call: dict[str, Any], frames: int, window: slice) -> dict[str, Any]:
        """The call for a window: its frames, at the first positions."""
        return {
            name: self._part_of(name, value, frames, window) for name, value in call.items()
        } | ({"num_frames": window.stop - window.start} if self._axis is None else {})

    def _part_of(self, name: str, value: Any, frames: int, window: slice) -> Any:
        length = window.stop - window.start
        if name == "image_rotary_emb" and value is not None:  # CogVideoX
            return tuple(x[: len(x) // frames * length] for x in value)
        if name == "visual_rope_pos":  # Kandinsky
            return [value[0][:length], *value[1:]]
        if not isinstance(value, Tensor):
            return value
        if name == self._latents and self._axis is None:
            return self._by_frames(value, frames)[:, window].flatten(1, 2)
        if name.endswith("timestep") and value.ndim == 2:  # AnyFlow: one for each frame
            return value[:, window]
        if name == "encoder_hidden_states" and value.ndim == 3 and self._is_per_frame(value):
            rows = value.unflatten(0, (-1, frames))[:, window]
            return rows.flatten(0, 1)
        is_clip = value.ndim == 5 and value.shape[self._frame_axis] == frames
        return value.narrow(self._frame_axis, window.start, length) if is_clip else value

    def _is_per_frame(self, text: Tensor) -> bool:
        return type(self._model).__name__ == "UNetMotionModel" and len(text) > 1
