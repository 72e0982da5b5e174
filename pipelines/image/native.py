"""Drawing at the size on which a model was trained, with whatever is attached to the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffaccel.pipelines.image.presets import Preset


def native_drawing(
    pipe: DiffusionPipeline, preset: Preset, steps: int | None = None
) -> Callable[[Sequence[str], Sequence[int]], list[Image.Image]]:
    """Returns a function that draws prompts with seeds, one picture each.

    Args:
        pipe: A stock text-to-image pipeline.
        preset: How it is called.
        steps: Denoising steps, the preset's by default.
    """

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return [
            pipe(
                prompt,
                width=preset.native,
                height=preset.native,
                num_inference_steps=steps or preset.steps,
                generator=torch.Generator().manual_seed(seed),
                **preset.arguments,
            ).images[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    return draw
