"""Writes the scorer as a stock transformers folder in half precision, with its card."""

from pathlib import Path

import torch

from embedded.folders import (
    edit_json,
    in_millions,
    load_average,
    name_tokenizer,
    open_to_all,
    write_card,
)
from embedded.scenes import words_of
from embedded.scorer.model import Scorer, new_processor
from embedded.vocabulary import Thing

CARD = Path(__file__).with_name("card.md")


def load_scorer(vocabulary: tuple[Thing, ...], weights: Path | None) -> tuple[Scorer, int]:
    """Rebuilds the scorer from averaged weights, or untrained without them.

    Returns:
        The scorer, and the number of steps that it was trained.
    """
    model = Scorer(words_of(vocabulary))
    return model, load_average(model, weights)


def export_scorer(model: Scorer, folder: Path) -> None:
    """Saves model, tokenizer and processor; fp16 weights load as fp32 unless asked otherwise.

    Args:
        model: The scorer.
        folder: Where it goes; files of an earlier export are replaced.
    """
    model.clip.to(torch.float16).save_pretrained(folder)
    model.clip.float()
    model.tokenizer.save_pretrained(folder)
    new_processor().save_pretrained(folder)
    edit_json(folder / "config.json", {"dtype": "float32"})
    name_tokenizer(folder)
    # The class name that loads with and without torchvision.
    edit_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    open_to_all(folder)


def write_scorer_card(
    folder: Path, model: Scorer, figures: dict[str, float], training: dict[str, object]
) -> None:
    """Writes README.md into a scorer's folder.

    Args:
        folder: The exported scorer.
        model: For its numbers of parameters.
        figures: What `evaluate_scorer` measured.
        training: "minutes", "step", "batch" and "pictures" of the training, and "objects" of the
            vocabulary.
    """
    values = (
        training
        | figures
        | {
            "vision_parameters": in_millions(model.clip.vision_model),
            "text_parameters": in_millions(model.clip.text_model),
        }
    )
    write_card(folder, CARD, values)
