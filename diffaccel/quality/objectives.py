"""What a head search maximises: callables that score pictures.

An objective takes pictures and their prompts and returns one number each, higher is better. Any
callable of that form serves; those here need no download, `PromptMatch` a scorer's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffaccel.errors import InputError, ModelError

Objective = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601
COMPARED = 64  # side in pixels at which pictures are compared


def sharpness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Standard deviation of the Laplacian of the brightness (values 0 to 1)."""

    def score(pixels: np.ndarray) -> float:
        grey = pixels @ LUMA
        middle = grey[1:-1, 1:-1]
        around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        return float((around - 4 * middle).std())

    return [score(_pixels(picture)) for picture in pictures]


def saturation(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean saturation of the HSV colours, 0 to 1."""
    return [float(np.asarray(p.convert("HSV"), np.float32)[..., 1].mean() / 255) for p in pictures]


def brightness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean brightness, 0 to 1."""
    return [float((_pixels(picture) @ LUMA).mean()) for picture in pictures]


def darkness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """One minus the mean brightness."""
    return [1.0 - value for value in brightness(pictures, prompts)]


def colourfulness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Spread and mean of the opponent colours red-green and yellow-blue.

    Source: "Measuring Colourfulness in Natural Images" (Hasler, Süsstrunk, 2003,
    https://doi.org/10.1117/12.477378), with values of 0 to 1 instead of 0 to 255.
    """

    def score(pixels: np.ndarray) -> float:
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        opponents = np.stack([red - green, 0.5 * (red + green) - blue])
        spread = np.hypot(*opponents.std((1, 2)))
        return float(spread + 0.3 * np.hypot(*opponents.mean((1, 2))))

    return [score(_pixels(picture)) for picture in pictures]


class Similarity:
    """Nearness to a picture: minus the mean distance of the colours at 64 x 64 pixels.

    Args:
        reference: The picture.
    """

    def __init__(self, reference: Image.Image) -> None:
        self._reference = self._small(reference)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Scores pictures, 0 for the reference itself."""
        return [-float(np.abs(self._small(p) - self._reference).mean()) for p in pictures]

    @staticmethod
    def _small(picture: Image.Image) -> np.ndarray:
        return _pixels(picture.resize((COMPARED, COMPARED), Image.Resampling.BOX))


class PromptMatch:
    """How well pictures fit their prompts: cosine of a CLIP model's two embeddings.

    PickScore and other scorers in the form of a CLIP model work too.

    Args:
        source: Folder or hub name of a `CLIPModel` with its tokenizer and image processor.
        device: Where it runs.

    Raises:
        ModelError: It cannot be loaded.
    """

    def __init__(self, source: str | Path, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            self._model = CLIPModel.from_pretrained(source).eval().to(device)
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._processor = AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"a scorer must be the folder or hub name of a CLIP model, {str(source)!r} is not "
                f"({reason})"
            ) from error
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Scores pictures, -1 to 1."""
        images, texts = self.embeddings(pictures, prompts)
        return (images * texts).sum(-1).tolist()

    @torch.no_grad()
    def embeddings(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, D) of pictures and of prompts, each of norm 1."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        words = self._tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        words.pop("token_type_ids", None)
        output: Any = self._model(pixel_values=pixels.to(self._device), **words)
        return output.image_embeds, output.text_embeds


OBJECTIVES: dict[str, Objective] = {
    "sharpness": sharpness,
    "saturation": saturation,
    "brightness": brightness,
    "darkness": darkness,
    "colourfulness": colourfulness,
}
"""Objectives without arguments, by their command-line names."""
WITH_ARGUMENT = ("similarity", "prompt-match")


def objective_named(
    name: str, reference: str | None = None, scorer: str | Path | None = None
) -> Objective:
    """Returns an objective by its command-line name.

    Args:
        name: A key of `OBJECTIVES`, "similarity" or "prompt-match".
        reference: File of the picture for "similarity".
        scorer: Folder or hub name of the CLIP model for "prompt-match".

    Raises:
        InputError: The name is unknown, or its argument is missing or unreadable.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name == "similarity":
        if reference is None:
            raise InputError("the objective similarity needs a picture; pass --reference FILE")
        try:
            return Similarity(Image.open(reference).convert("RGB"))
        except OSError as error:
            raise InputError(
                f"--reference must be a readable picture, {reference!r} is not ({error})"
            ) from error
    if name == "prompt-match":
        if scorer is None:
            raise InputError("the objective prompt-match needs a CLIP model; pass --scorer FOLDER")
        return PromptMatch(scorer)
    raise InputError(
        f"--objective must be one of {', '.join((*OBJECTIVES, *WITH_ARGUMENT))}, got {name!r}"
    )


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float32) / 255
