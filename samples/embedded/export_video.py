"""Writes the video model as a stock diffusers folder in half precision, with its card."""

from pathlib import Path
from string import Template

import torch
from clips import Actor, words_of
from diffusers import AutoencoderKLWan
from export_image import edit_json
from video_model import VideoModel

SHIFT = 2.0  # of the noise schedule
CARD = Path(__file__).with_name("video_card.md")


def load_video_model(cast: tuple[Actor, ...], weights: Path | None) -> VideoModel:
    """Rebuilds the model from averaged weights, or untrained without them."""
    model = VideoModel(words_of(cast))
    if weights is not None:
        state = torch.load(weights, weights_only=True)
        model.load_state_dict(state.get("average", state))
    return model.eval()


def export_video(model: VideoModel, vae: AutoencoderKLWan, folder: Path) -> None:
    """Saves the pipeline with fp16 weights that load as fp32 unless a dtype is asked for.

    Args:
        model: Text encoder and transformer.
        vae: The autoencoder.
        folder: Where the pipeline goes; files of an earlier export are replaced.
    """
    vae.register_to_config(_name_or_path="")  # else the folder names a path of this machine
    model.pipeline(vae, SHIFT).to(torch.float16).save_pretrained(folder)
    edit_json(folder / "text_encoder" / "config.json", {"dtype": "float32"})
    # The class name that transformers 4 and 5 share.
    stock = "PreTrainedTokenizerFast"
    edit_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": stock})
    edit_json(folder / "model_index.json", {"tokenizer": ["transformers", stock]})
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    model.text_encoder.float()
    vae.float()


def write_card(
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
        name: f"{sum(weight.numel() for weight in part.parameters()) / 1e6:.1f} M"
        for name, part in (
            ("transformer", model.transformer),
            ("encoder", model.text_encoder),
            ("autoencoder", vae),
        )
    }
    card = Template(CARD.read_text()).substitute(counts, **figures)
    (folder / "README.md").write_text(card)
