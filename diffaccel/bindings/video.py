"""Bindings of video transformers: Wan, HunyuanVideo, CogVideoX and LTX-Video."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched
from diffaccel.layout import Grid, TokenLayout

EMBEDDED_POSITIONS = 512  # rotary table of the model in the package; published ones have 1024


class WanBinding(Binding):
    """Wan 2.1 and 2.2: self-attention over the video alone; text is cross-attended.

    Each transformer of Wan 2.2 A14B is a denoiser of its own.
    """

    patterns = ((r"blocks\.\d+\.attn1", "self"),)

    def family(self, model: nn.Module, pipe: Any) -> str:
        settings = getattr(pipe, "config", {})
        config = model.config
        if settings.get("expand_timesteps") or config.in_channels == config.out_channels == 48:
            return "wan2.2-ti2v"
        has_experts = getattr(pipe, "transformer_2", None) is not None
        version = "wan2.2" if has_experts or settings.get("boundary_ratio") else "wan2.1"
        # Image to video: the first frame comes as further input channels or as image tokens.
        is_i2v = config.image_dim is not None or config.in_channels > config.out_channels
        return f"{version}-{'i2v' if is_i2v else 't2v'}"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        if self.family(model, None) == "wan2.2-ti2v":
            return (31, 22, 40)  # 121 frames of 704 x 1280, each token 32 x 32 pixels
        if model.config.rope_max_seq_len == EMBEDDED_POSITIONS:
            return (5, 8, 8)  # 17 frames of 128 x 128
        is_large = model.config.num_attention_heads >= 40
        return (21, 45, 80) if is_large else (21, 30, 52)  # 81 frames, 720 or 480 rows

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        sizes = call["hidden_states"].shape[-3:]
        return TokenLayout.video(*map(patched, sizes, model.config.patch_size))


class HunyuanVideoBinding(Binding):
    """HunyuanVideo: the video first, then text, whose padding the attention mask excludes."""

    patterns = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "hunyuan"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        return (33, 45, 80)  # 129 frames of 720 x 1280

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = call["hidden_states"].shape[-3:]
        patch, patch_t = model.config.patch_size, model.config.patch_size_t
        return TokenLayout.video(
            patched(frames, patch_t),
            patched(height, patch),
            patched(width, patch),
            text_after=call["encoder_hidden_states"].shape[1],
        )

    def skip_reason(self, name: str) -> str:
        return "text token refiner" if "token_refiner" in name else super().skip_reason(name)


class CogVideoXBinding(Binding):
    """CogVideoX 1.0 and 1.5: text first, then the video; latents are (B, F, C, H, W)."""

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "cogvideox"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        config = model.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        sides = (side // config.patch_size for side in (config.sample_height, config.sample_width))
        return (max(1, frames // (config.patch_size_t or 1)), *sides)

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        _, frames, _, height, width = call["hidden_states"].shape
        patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
        return TokenLayout.video(
            patched(frames, patch_t),
            patched(height, patch),
            patched(width, patch),
            text_before=call["encoder_hidden_states"].shape[1],
        )


class LTXVideoBinding(Binding):
    """LTX-Video: self-attention over the video alone, which arrives packed.

    The pipelines pass the grid of tokens as numbers. A call with precomputed coordinates instead
    (LTX condition pipeline) does not tell it and runs dense.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "self"),)
    batches_prompts = True

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "ltx"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        return (21, 16, 22)  # 161 frames of 512 x 704, each token 32 x 32 pixels

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        return TokenLayout.video(call["num_frames"], call["height"], call["width"])
