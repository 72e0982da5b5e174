"""Writes the video model as a stock diffusers folder in half precision, with its card."""

from pathlib import Path

from diffusers import AutoencoderKLWan

from embedded.folders import in_millions, load_average, save_pipeline, write_card
from embedded.video.clips import Actor, words_of
from embedded.video.model import VideoModel

SHIFT = 2.0  # of the noise schedule
CARD = Path(__file__).with_name("card.md")


def load_video_model(cast: tuple[Actor, ...], weights: Path | None) -> VideoModel:
    """Rebuilds the model from averaged weights, or untrained without them."""
    model = VideoModel(words_of(cast))
    load_average(model, weights)
    return model


def export_video(model: VideoModel, vae: AutoencoderKLWan, folder: Path) -> None:
    """Saves text encoder, transformer and autoencoder, see `save_pipeline`."""
    save_pipeline(model.pipeline(vae, SHIFT), folder)
    model.text_encoder.float()
    vae.float()


def write_video_card(
    folder: Path, model: VideoModel, vae: AutoencoderKLWan, figures: dict[str, str]
) -> None:
    """Writes the model card.

    Args:
        folder: Of the pipeline.
        model: Counted.
        vae: Counted.
        figures: What the template asks for beside the counts: how long it was trained, and how
            well it does.
    """
    counts = {
        "transformer": in_millions(model.transformer),
        "encoder": in_millions(model.text_encoder),
        "autoencoder": in_millions(vae),
    }
    write_card(folder, CARD, counts | figures)
