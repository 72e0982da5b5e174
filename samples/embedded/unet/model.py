"""Builds the untrained parts of the embedded U-Net model and puts them into a pipeline."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from embedded.image.model import new_tokenizer

WORDS = 32  # to which captions are padded, the end word included
TEXT_WIDTH = 96
HEAD_DIM = 40  # of the U-Net
WIDTHS = (40, 40, 80, 80)  # of its levels, on latents of 32 x 32 to 4 x 4 at 256 px
PLACES = 32  # leading dimensions of a word that say where it stands
SHARPNESS = 0.84  # of the heads that look back
SLOWEST, FASTEST = 0.1, 1.5  # radians per word


def new_text_encoder(words: int) -> CLIPTextModel:
    """Builds the encoder of the captions: two causal layers of width 96, two heads looking back.

    Args:
        words: Number of words that the tokenizer knows.
    """
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=WORDS,
            hidden_act="gelu",
            projection_dim=TEXT_WIDTH,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    give_order(encoder)
    return encoder


@torch.no_grad()
def give_order(encoder: CLIPTextModel) -> None:
    """Lets words know which words stood before them, so that they bind to places.

    From small random values, order is learned late or not at all. Places are waves in the
    leading dimensions of a word, its meaning fills the others. In the first layer one head sees
    all earlier words alike, one looks back by one word and one by three.
    """
    steps = torch.arange(PLACES // 2) / (PLACES // 2 - 1)
    frequencies = FASTEST * (SLOWEST / FASTEST) ** steps
    angles = torch.arange(WORDS)[:, None] * frequencies
    meaning = encoder.embeddings.token_embedding.weight
    meaning.normal_(0, 0.5)
    meaning[:, :PLACES] = 0.0
    place = encoder.embeddings.position_embedding.weight
    place.zero_()
    place[:, :PLACES] = 0.7 * torch.cat([angles.sin(), angles.cos()], 1)

    attention = encoder.encoder.layers[0].self_attn
    attention.q_proj.weight[:PLACES].mul_(0.1)
    for head, back in ((1, 1), (2, 3)):
        rows = slice(head * PLACES, (head + 1) * PLACES)
        sine, cosine = (back * frequencies).sin().diag(), (back * frequencies).cos().diag()
        turned = torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])
        for projection, matrix in (
            (attention.q_proj, turned),
            (attention.k_proj, torch.eye(PLACES)),
        ):
            projection.weight[rows] = 0.0
            projection.weight[rows, :PLACES] = SHARPNESS * matrix


def new_unet(is_coarse: bool = False) -> UNet2DConditionModel:
    """Builds the velocity model: four levels, three with attention each way, four norm groups.

    Attention at 16 x 16 to 4 x 4 on the way down and at 8 x 8 to 32 x 32 on the way up. Wide norm
    groups, since narrow ones erase the colour of flat areas. The residual branches and the output
    start at zero.

    Args:
        is_coarse: Without the finest level, for pictures of half the side.
    """
    widths = WIDTHS[is_coarse:]
    unet = UNet2DConditionModel(
        sample_size=32 // (1 + is_coarse),
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3)[is_coarse:],
        mid_block_type=None,
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (len(widths) - 1)),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        # The number of heads, in spite of its name.
        attention_head_dim=tuple(width // HEAD_DIM for width in widths),
        use_linear_projection=True,
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.startswith("conv_out") or "conv2." in name or "proj_out." in name:
                weight.zero_()
    return unet


@torch.no_grad()
def grow(unet: UNet2DConditionModel, coarse: dict[str, Tensor]) -> None:
    """Puts a trained coarse U-Net inside, so that the first picture is its own, enlarged.

    At twice the size, layers that have learned shapes draw none; they must go on to see what they
    saw. The new level takes means of 2 x 2 on the way down, doubled as
    means of noise have half its deviation, and repeats values on the way up.

    Args:
        unet: Untrained, with all levels.
        coarse: State of a U-Net without the finest one.
    """
    inner = {_one_level_deeper(name): weight for name, weight in coarse.items()}
    unet.load_state_dict(unet.state_dict() | inner)
    width = WIDTHS[0]
    same = torch.eye(width)
    pool = unet.down_blocks[0].downsamplers[0].conv
    pool.weight.zero_()
    pool.weight[:, :, 1:, 1:] = 0.5 * same[:, :, None, None]
    pool.bias.zero_()
    nn.init.dirac_(unet.up_blocks[-2].upsamplers[0].conv.weight)
    unet.up_blocks[-2].upsamplers[0].conv.bias.zero_()
    for block in unet.up_blocks[-1].resnets:
        block.conv_shortcut.weight.zero_()
        block.conv_shortcut.weight[:, :width, 0, 0] = same
        block.conv_shortcut.bias.zero_()


def _one_level_deeper(name: str) -> str:
    """Where a weight of the coarse U-Net stands in the whole one."""
    first, number, *rest = name.split(".")
    return ".".join((first, str(int(number) + 1), *rest)) if first == "down_blocks" else name


def new_scheduler() -> DDIMScheduler:
    """Builds the noise schedule: that of Stable Diffusion, down to no signal at all.

    Velocities as targets and steps that begin at pure noise, after "Common Diffusion Noise
    Schedules and Sample Steps are Flawed" (Lin et al., 2023, https://arxiv.org/abs/2305.08891):
    otherwise the colour of the background is given away by the noisy latents in training only.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # the pipeline asks for it; without effect on trailing steps
    )


class UNetModel(nn.Module):
    """What the diffusion stage trains: text encoder and U-Net.

    Args:
        words: Words of the captions.
        is_coarse: Without the finest level of the U-Net, see `new_unet`.
    """

    def __init__(self, words: Iterable[str], is_coarse: bool = False) -> None:
        super().__init__()
        self.tokenizer = new_tokenizer(words, WORDS)
        self.text_encoder = new_text_encoder(len(self.tokenizer))
        self.unet = new_unet(is_coarse).to(memory_format=torch.channels_last)
        self.scheduler = new_scheduler()

    def grow(self, coarse: dict[str, Tensor]) -> None:
        """Takes over a trained coarse model of the same words, whose state is given."""
        parts = {"text_encoder": {}, "unet": {}}
        for name, weight in coarse.items():
            part, name = name.split(".", 1)
            parts[part][name] = weight
        self.text_encoder.load_state_dict(parts["text_encoder"])
        grow(self.unet, parts["unet"])

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Takes over the weights of a pipeline folder; words that it does not know stay new."""
        old = StableDiffusionPipeline.from_pretrained(folder, vae=None, safety_checker=None)
        self.unet.load_state_dict(old.unet.state_dict())
        known = old.tokenizer.get_vocab()
        table = self.text_encoder.get_input_embeddings().weight
        rows = table.clone()
        for word, index in self.tokenizer.get_vocab().items():
            if word in known:
                rows[index] = old.text_encoder.get_input_embeddings().weight[known[word]]
        own, theirs = self.text_encoder.parameters(), old.text_encoder.parameters()
        for weight, source in zip(own, theirs, strict=True):
            weight.copy_(rows if weight is table else source)

    def encode(self, captions: list[str]) -> Tensor:
        """Encodes captions to (B, 32, 96) as StableDiffusionPipeline does, without a mask."""
        ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=WORDS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids).last_hidden_state

    def forward(self, noisy: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
        """Predicts velocities (B, 8, h, w).

        Args:
            noisy: Latents (B, 8, h, w).
            timesteps: Places in the noise schedule (B,), 0 to 999.
            captions: B captions.
        """
        return self.unet(noisy, timesteps, self.encode(captions), return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """Puts the parts into a stock pipeline.

        Args:
            vae: An autoencoder without shift, which the pipeline would ignore; see
                `without_shift` in export_unet.py.
        """
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
