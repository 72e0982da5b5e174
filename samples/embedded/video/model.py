"""Builds the untrained parts of the embedded video model and puts them into a pipeline."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from embedded.image.model import SEQUENCE_ENCODER, give_order, new_tokenizer
from embedded.video.place_codes import give_places

CHANNELS = 16  # of the latents
WIDTH = 256  # of the transformer
HEADS = 4
LAYERS = 4
HIDDEN = 512  # of the feed-forward layers
TEXT_WIDTH = SEQUENCE_ENCODER["d_model"]


def new_text_encoder(words: int) -> UMT5EncoderModel:
    """Builds the encoder of the captions, whose heads see the words before and after."""
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            is_encoder_decoder=False,
            **SEQUENCE_ENCODER,
        )
    )
    with torch.no_grad():
        encoder.shared.weight.normal_(0, 0.5)
    give_order(encoder)
    return encoder


def new_transformer() -> WanTransformer3DModel:
    """Builds the velocity model: four blocks of width 256 on tokens of 16 x 16 px x 4 frames."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=HIDDEN,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=512,
    )
    model.register_to_config(_native_grid=(5, 8, 8))  # tokens: 17 frames of 128 x 128 pixels
    with torch.no_grad():  # starts close to an unmodulated network whose output is zero
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        model.scale_shift_table.mul_(0.3)
        model.condition_embedder.time_proj.weight.mul_(0.3)
        model.condition_embedder.time_proj.bias.zero_()
        for block in model.blocks:
            block.scale_shift_table.mul_(0.3)
            block.scale_shift_table[:, [2, 5]] = 1.0  # gates of attention and feed-forward
    give_places(model)
    return model


class CountedPads(WanAttnProcessor):
    """Attends to a few zero rows as if they were many, which the pipeline pads captions with.

    Attributes:
        bias: Log of how many rows each row stands for, (B, 1, 1, T); None: one each.
    """

    bias: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Runs the stock processor with the bias as its mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


class VideoModel(nn.Module):
    """What the diffusion stage trains: text encoder and transformer.

    Args:
        words: Words of the captions.
    """

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__()
        self.tokenizer = new_tokenizer(words, 512)
        self.text_encoder = new_text_encoder(len(self.tokenizer))
        self.transformer = new_transformer()
        self.pads = CountedPads()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self.pads)

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Takes over the weights of a pipeline folder of the same vocabulary."""
        old = WanPipeline.from_pretrained(folder, vae=None)
        self.transformer.load_state_dict(old.transformer.state_dict())
        self.text_encoder.load_state_dict(old.text_encoder.state_dict())

    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Encodes captions as WanPipeline does, with its many zero rows shortened to a few.

        Args:
            captions: B captions.
            length: Rows to which the pipeline would pad, its `max_sequence_length`.

        Returns:
            The rows (B, T, 128), and the log of how many rows each stands for, (B, 1, 1, T).
        """
        found = self.tokenizer(captions, padding=True, return_tensors="pt")
        mask = nn.functional.pad(found.attention_mask, (0, 1)).float()
        rows = self.text_encoder(found.input_ids, found.attention_mask).last_hidden_state
        rows = nn.functional.pad(rows, (0, 0, 0, 1)) * mask[..., None]
        words = mask.sum(1, keepdim=True)
        pads = ((length - words) / (mask.shape[1] - words)).log()
        return rows, torch.where(mask > 0, 0.0, pads)[:, None, None]

    def forward(self, noisy: Tensor, sigma: Tensor, captions: list[str], length: int) -> Tensor:
        """Predicts the velocity, noise minus clip.

        Args:
            noisy: Latents (B, 16, F, h, w).
            sigma: Noise levels (B,), 0 to 1.
            captions: B captions.
            length: Rows to which the pipeline would pad the captions.
        """
        rows, self.pads.bias = self.encode(captions, length)
        try:
            return self.transformer(
                hidden_states=noisy,
                timestep=1000 * sigma,
                encoder_hidden_states=rows,
                return_dict=False,
            )[0]
        finally:
            self.pads.bias = None

    def pipeline(self, vae: AutoencoderKLWan, shift: float) -> WanPipeline:
        """Puts the parts, with stock attention, into a stock pipeline."""
        stock = WanTransformer3DModel.from_config(self.transformer.config)
        stock.load_state_dict(self.transformer.state_dict())
        return WanPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=stock.eval(),
        )
