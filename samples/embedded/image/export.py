"""Writes the image model as a stock diffusers folder in half precision."""

from pathlib import Path

from diffusers import AutoencoderKL

from embedded.folders import load_average, save_pipeline
from embedded.image.model import ImageModel
from embedded.scenes import words_of
from embedded.vocabulary import Thing

SHIFT = 2.0  # of the noise schedule; constant, so that it also holds at 65k tokens


def load_model(vocabulary: tuple[Thing, ...], weights: Path | None) -> ImageModel:
    """Rebuilds the model from averaged weights, or untrained without them."""
    model = ImageModel(words_of(vocabulary))
    load_average(model, weights)
    return model


def export(model: ImageModel, vae: AutoencoderKL, folder: Path) -> None:
    """Saves text encoders, transformer and autoencoder, see `save_pipeline`."""
    save_pipeline(model.pipeline(vae, SHIFT), folder)
    model.float()
    vae.float()
