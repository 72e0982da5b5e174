"""Writes the U-Net model as a stock diffusers folder in half precision, with its card."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from embedded.folders import in_millions, load_average, save_pipeline, write_card
from embedded.scenes import words_of
from embedded.unet.model import UNetModel
from embedded.vocabulary import Thing

CARD = Path(__file__).with_name("card.md")


def load_unet_model(vocabulary: tuple[Thing, ...], weights: Path | None) -> tuple[UNetModel, int]:
    """Rebuilds the model from averaged weights, or untrained without them.

    Returns:
        The model, and the number of steps that it was trained.
    """
    model = UNetModel(words_of(vocabulary))
    return model, load_average(model, weights)


@torch.no_grad()
def without_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """Copies an autoencoder so that its latents have mean 0 without `shift_factor`.

    StableDiffusionPipeline scales latents but does not shift them. The shift moves into the
    1 x 1 convolutions between latents and coder, which are the identity otherwise. It cannot
    move into the bias of the decoder's first convolution, as that one pads with zeros.

    Args:
        vae: An autoencoder without such convolutions. One without shift is only copied.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    shift = config["shift_factor"]
    if not shift:
        return copy.deepcopy(vae)
    if config["use_quant_conv"] or config["use_post_quant_conv"]:
        raise ValueError(
            "an autoencoder with a shift must have no quant_conv and no post_quant_conv, "
            "got one that has; use that of the embedded image model"
        )
    channels = config["latent_channels"]
    twin = AutoencoderKL(
        **config | {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    )
    for convolution, offset in ((twin.quant_conv, -shift), (twin.post_quant_conv, shift)):
        nn.init.dirac_(convolution.weight)
        convolution.bias.zero_()
        convolution.bias[:channels] = offset
    twin.encoder.load_state_dict(vae.encoder.state_dict())
    twin.decoder.load_state_dict(vae.decoder.state_dict())
    return twin.to(next(vae.parameters()).dtype).eval()


def export_unet(model: UNetModel, vae: AutoencoderKL, folder: Path) -> None:
    """Saves the pipeline with fp16 weights that load as fp32 unless a dtype is asked for.

    Args:
        model: Text encoder and U-Net.
        vae: The autoencoder, with or without a shift.
        folder: Where the pipeline goes; files of an earlier export are replaced.
    """
    save_pipeline(model.pipeline(without_shift(vae)), folder)
    model.float()


def write_unet_card(
    folder: Path,
    sheet: Image.Image,
    model: UNetModel,
    figures: dict[str, float],
    training: dict[str, object],
) -> None:
    """Writes README.md and the contact sheet into a pipeline folder.

    Args:
        folder: The exported pipeline.
        sheet: Pictures of the fixed prompts.
        model: For its numbers of parameters.
        figures: What `evaluate` measured.
        training: "minutes", "step" and "batch" of the training, and "objects" of the vocabulary.
    """
    small = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.BOX)
    small.save(folder / "contact.jpg", quality=88)
    values = training | {
        "unet_parameters": in_millions(model.unet),
        "text_parameters": in_millions(model.text_encoder),
        "prompts": figures["prompts"],
        "top_1": f"{figures['top_1']:.0%}",
        "top_5": f"{figures['top_5']:.0%}",
    }
    write_card(folder, CARD, values)
