"""A contact sheet of what each attention head does to a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from diffaccel.guidance.attachment import set_guidance
from diffaccel.guidance.head_search.search import Draw, Head
from diffaccel.guidance.perturb.heads import HeadPerturbation

LABEL = 22  # pixels above each picture
COLUMNS = 8


def head_sheet(
    pipe: DiffusionPipeline,
    draw: Draw,
    prompt: str,
    heads: Sequence[Head],
    *,
    seed: int = 0,
    strength: float = 1.0,
    scale: float = 3.0,
    advance: Callable[[], None] = lambda: None,
) -> Image.Image:
    """Draws one prompt without guidance and with each head, side by side, labelled layer.head.

    Args:
        pipe: The pipeline that `draw` uses.
        draw: Makes pictures for prompts and seeds.
        prompt: What to draw.
        heads: The heads (layer, head).
        seed: Of the noise, the same for all.
        strength: Of the perturbation.
        scale: Of the guidance.
        advance: Called after each picture.
    """
    pictures = [("none", draw([prompt], [seed])[0])]
    advance()
    for head in heads:
        perturbation = HeadPerturbation(heads=(head,), strength=strength)
        with set_guidance(pipe, perturbation, scale=scale):
            pictures.append((f"{head[0]}.{head[1]}", draw([prompt], [seed])[0]))
        advance()
    return _side_by_side(pictures)


def _side_by_side(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    width, height = pictures[0][1].size
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (label, picture) in enumerate(pictures):
        left, top = index % columns * width, index // columns * (height + LABEL)
        pen.text((left + 6, top + 4), label, fill="black")
        sheet.paste(picture, (left, top + LABEL))
    return sheet
