"""A contact sheet of what each attention head does to a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from PIL import Image

from diffaccel.guidance.attachment import set_guidance
from diffaccel.guidance.head_search.search import Draw, Head
from diffaccel.guidance.perturb.heads import HeadPerturbation
from diffaccel.quality.contact_sheet import grid

COLUMNS = 8


@dataclass(frozen=True, slots=True)
class HeadSheet:
    """What a sheet shows.

    Args:
        prompt: What to draw.
        heads: The heads (layer, head), one a picture.
        seed: Of the noise, the same for all.
        strength: Of the perturbation, 0 to 1.
        scale: Of the guidance.
    """

    prompt: str
    heads: tuple[Head, ...]
    seed: int = 0
    strength: float = 1.0
    scale: float = 3.0


def head_sheet(
    pipe: DiffusionPipeline,
    draw: Draw,
    sheet: HeadSheet,
    advance: Callable[[], None] = lambda: None,
) -> Image.Image:
    """Draws one prompt without guidance and with each head, side by side, labelled layer.head.

    Args:
        pipe: The pipeline that `draw` uses.
        draw: Makes pictures for prompts and seeds.
        sheet: What to show.
        advance: Called after each picture.
    """
    pictures = list(draw([sheet.prompt], [sheet.seed]))
    advance()
    for head in sheet.heads:
        perturbation = HeadPerturbation(heads=(head,), strength=sheet.strength)
        with set_guidance(pipe, perturbation, scale=sheet.scale):
            pictures += draw([sheet.prompt], [sheet.seed])
        advance()
    labels = ["none", *(f"{layer}.{head}" for layer, head in sheet.heads)]
    return grid(pictures, COLUMNS, labels)
