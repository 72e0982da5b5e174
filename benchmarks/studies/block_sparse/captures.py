"""Query, key and value of real attention calls, captured while the embedded models draw.

Pictures and clips are drawn above the native size: a native sample, enlarged, noised part of the
way and denoised at full size, whose attention calls are kept. `DRAWINGS` says which, and sets
some apart on which defaults were chosen; what is reported comes from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import add_attention_hook, remove_attention_hook
from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.bindings import binding_of
from diffaccel.files import replacing
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods import FullAttn
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE, EMBEDDED_VIDEO
from diffaccel.pipelines.image import ImageJob, generate_image
from diffaccel.pipelines.image.presets import preset_for
from diffaccel.pipelines.loading import load_image_pipeline, load_video_pipeline
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob

PIXELS_PER_TOKEN = 16
FRAMES_PER_TOKEN = 4
CLIP_STEPS = 12


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture or clip, drawn above the native size.

    Args:
        prompt: What to draw.
        size: (width, height) in pixels, multiples of 16.
        steps: Denoising steps of the last stage whose attention is captured, from 0.
        frames: Of a clip, 1 more than a multiple of 4; 0 for a picture.
        seed: Of all noise.
        tunes: Whether it is kept apart for choosing defaults.
    """

    prompt: str
    size: tuple[int, int]
    steps: tuple[int, ...] = (0, 3)
    frames: int = 0
    seed: int = 0
    tunes: bool = False

    @property
    def grid(self) -> Grid:
        """Tokens of the last stage."""
        width, height = (side // PIXELS_PER_TOKEN for side in self.size)
        return 1 if self.frames == 0 else (self.frames - 1) // FRAMES_PER_TOKEN + 1, height, width

    @property
    def group(self) -> str:
        """ "image" or "video", what it is reported with."""
        return "video" if self.frames else "image"

    @property
    def label(self) -> str:
        """A name for a file."""
        size = "x".join(map(str, (*self.size, *([self.frames] if self.frames else []))))
        return f"{self.prompt.replace(' ', '-')}-{size}-{self.seed}"


DRAWINGS = (
    Drawing("a green frog on a red background", (1024, 1024), (0, 3), seed=0, tunes=True),
    Drawing("two yellow cars", (1152, 768), (1, 3), seed=1, tunes=True),
    Drawing("a pink flower", (768, 1024), (0, 2), seed=8, tunes=True),
    Drawing("a purple butterfly on a white background", (1024, 1024), (0, 2), seed=2),
    Drawing("a house and a tree", (768, 1152), (1, 3), seed=3),
    Drawing("an owl", (1024, 1024), (0, 2), seed=4),
    Drawing("a red rocket on a blue background", (1280, 640), (1, 3), seed=5),
    Drawing("a green apple and a blue boat", (1152, 896), (0, 3), seed=6),
    Drawing("a guitar on an orange background", (832, 1088), (1, 2), seed=7),
    Drawing("a star turns on a purple background", (320, 384), (2,), 33, seed=2, tunes=True),
    Drawing("a boat moves to the right", (448, 384), (1, 3), 17, seed=6, tunes=True),
    Drawing("a red apple turns on a blue background", (320, 384), (0, 3), 33, seed=0),
    Drawing("a rocket flies to the left", (512, 384), (1, 3), 17, seed=1),
    Drawing("a car drives to the left on a yellow background", (384, 512), (0, 2), 17, seed=3),
    Drawing("a green ball grows", (416, 416), (1, 2), 21, seed=5),
)
"""The smaller part tunes."""


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """Inputs of one attention call, (1, N, H, D) each, and where they come from."""

    source: str
    step: int
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    scale: float


class CaptureAttention(AttentionHook):
    """Keeps the inputs of the attention calls over one grid; results stay unchanged."""

    is_active = True

    def __init__(self, source: str, grid: Grid, steps: Sequence[int]) -> None:
        self.captured: list[Captured] = []
        self._source, self._grid, self._steps = source, grid, steps
        self._calls: Counter[int] = Counter()

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Answers as without the hook; other grids are those of other stages."""
        layout, layer = call.layout, call.layer.index
        if layout is not None and layout.grid == self._grid:
            step = self._calls[layer]
            self._calls[layer] += 1
            if step in self._steps:
                inputs = call.inputs()
                query, key, value = (
                    x[:1].clone() for x in (inputs.query, inputs.key, inputs.value)
                )
                self.captured.append(
                    Captured(
                        self._source, step, layer, query, key, value, inputs.layout, inputs.scale
                    )
                )
        return compute(call)


@contextmanager
def hooked(model: nn.Module, hook: AttentionHook) -> Iterator[None]:
    """Lets a hook act around the self-attention of a denoiser."""
    names = tuple(layer.name for layer in binding_of(model).layers(model))
    add_attention_hook(model, hook, names)
    try:
        yield
    finally:
        remove_attention_hook(model, hook)


def pipeline_for(drawing: Drawing, device: str = "cpu") -> Any:
    """Loads the embedded model that draws it."""
    if drawing.frames:
        return load_video_pipeline(EMBEDDED_VIDEO, device=device)
    return load_image_pipeline(EMBEDDED_IMAGE, device=device)


def draw(pipe: Any, drawing: Drawing, hook: AttentionHook | None = None) -> np.ndarray:
    """Draws with dense attention, or what a hook answers in its place.

    A clip is refined by windows (`FreeSwim` without its full path) unless the hook answers.

    Args:
        pipe: Of `pipeline_for`.
        drawing: What.
        hook: Acts around the self-attention of all stages.

    Returns:
        (F, H, W, 3) uint8, F = 1 for a picture.
    """
    with hooked(pipe.transformer, hook or AttentionHook()), torch.inference_mode():
        if not drawing.frames:
            preset = preset_for(pipe, EMBEDDED_IMAGE)
            asked = ImageJob(drawing.prompt, drawing.size, preset, FullAttn(), seed=drawing.seed)
            return np.asarray(generate_image(pipe, asked).image)[None]
        recipe = FreeSwim(steps=8, guide_every=None)
        job = VideoJob(
            drawing.prompt, drawing.size, drawing.frames,
            recipe=recipe, steps=CLIP_STEPS, seed=drawing.seed,
        )  # fmt: skip
        frames = generate_video(pipe, job).frames[0].permute(0, 2, 3, 1)
        return (frames * 255).round().byte().numpy()


def capture(pipe: Any, drawing: Drawing) -> list[Captured]:
    """Draws, and returns the attention calls of the last stage at the steps of the drawing."""
    hook = CaptureAttention(drawing.label, drawing.grid, drawing.steps)
    draw(pipe, drawing, hook)
    return hook.captured


def captured(drawing: Drawing, folder: Path) -> list[Captured]:
    """Returns the calls of a drawing, from a file of the folder if an earlier run wrote it."""
    path = folder / f"{drawing.label}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        calls = capture(pipeline_for(drawing), drawing)
        with replacing(path) as unfinished:
            torch.save(calls, unfinished)
    return torch.load(path, weights_only=False)
