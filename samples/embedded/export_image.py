"""Writes the image model as a stock diffusers folder in half precision."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from image_model import ImageModel
from train_image import words_of
from vocabulary import Thing

SHIFT = 2.0  # of the noise schedule; constant, so that it also holds at 65k tokens
PARTS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


def load_model(vocabulary: tuple[Thing, ...], weights: Path | None) -> ImageModel:
    """Rebuilds the model from averaged weights, or untrained without them."""
    model = ImageModel(words_of(vocabulary))
    if weights is not None:
        state = torch.load(weights, weights_only=True)
        model.load_state_dict(state.get("average", state))
    return model.eval()


def export(model: ImageModel, vae: AutoencoderKL, folder: Path) -> None:
    """Saves the pipeline with fp16 weights that load as fp32 unless a dtype is asked for.

    Args:
        model: Text encoders and transformer.
        vae: The autoencoder.
        folder: Where the pipeline goes; files of an earlier export are replaced.
    """
    vae.register_to_config(_name_or_path="")  # else the folder names a path of this machine
    model.pipeline(vae, SHIFT).to(torch.float16).save_pretrained(folder)
    for part in PARTS:
        edit_json(folder / part / "config.json", {"dtype": "float32"})
    # The class name that transformers 4 and 5 share.
    for part in TOKENIZERS:
        edit_json(
            folder / part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
    edit_json(
        folder / "model_index.json",
        {part: ["transformers", "PreTrainedTokenizerFast"] for part in TOKENIZERS},
    )
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    model.float()
    vae.float()


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Changes entries of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content, indent=2) + "\n")
