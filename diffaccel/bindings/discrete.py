"""Bindings of denoisers of codebook indices: Amused and VQ-Diffusion."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, image_grid, zeros
from diffaccel.layout import Grid, TokenLayout


class UVitBinding(Binding):
    """Amused: `attn1` of the middle is self-attention; the outer blocks attend to text alone.

    The model gets no timestep, so that a schedule by steps does not hold.
    """

    patterns = (
        (r"transformer_layers\.\d+\.attn1", "self"),
        (r"transformer_layers\.\d+\.attn2", "cross"),
        (r"(down|up)_block\.attention_blocks\.\d+\.attn[12]", "cross"),
    )
    latents = "input_ids"
    batches_prompts = True
    unguided = "it gets no timestep, and its prediction comes without a container"
    text_length = 77

    def family(self, model: Any, pipe: Any) -> str:
        return "amused"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        size = model.config.sample_size
        return (1, *(size // 2 if model.config.downsample else size,) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = call["input_ids"].shape[-2:]
        if model.config.downsample:  # the last row and column of odd sizes stay
            height, width = (height + 1) // 2, (width + 1) // 2
        return TokenLayout.image(height, width)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        conditions = config.micro_cond_embed_dim // config.micro_cond_encode_dim
        return {
            "input_ids": zeros(model, batch, *latents).long(),
            "encoder_hidden_states": zeros(model, batch, text, config.encoder_hidden_size),
            "pooled_text_emb": zeros(model, batch, config.cond_embed_dim),
            "micro_conds": zeros(model, batch, conditions),
        }


class Transformer2DBinding(Binding):
    """A transformer by itself, as VQ-Diffusion has one: indices (B, tokens), rows of an image.

    Within U-Nets the class belongs to them.
    """

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    batches_prompts = True
    text_length = 77

    def family(self, model: Any, pipe: Any) -> str:
        return "vq-diffusion"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        size = config.sample_size
        return None if size is None else (1, *(size // (config.patch_size or 1),) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        latents, config = call["hidden_states"], model.config
        if latents.ndim == 2:
            return TokenLayout.image(config.sample_size, config.sample_size)
        return TokenLayout.video(*image_grid(latents, config.patch_size or 1))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        shape = (batch, config.in_channels, *latents)
        call: dict[str, Any] = {"timestep": zeros(model).long()}
        if config.num_vector_embeds is not None:
            call["hidden_states"] = zeros(model, batch, latents[0] * latents[1]).long()
        else:
            call["hidden_states"] = zeros(model, *shape)
        if config.cross_attention_dim is not None:
            call["encoder_hidden_states"] = zeros(model, batch, text, config.cross_attention_dim)
        return call
