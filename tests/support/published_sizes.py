"""Full-size configurations of the denoisers: the published ones, or defaults of the classes."""

from __future__ import annotations

from typing import Any, NamedTuple

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {  # SD3 medium
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "FluxTransformer2DModel": {"guidance_embeds": True},  # FLUX.1 dev
    "CogVideoXTransformer3DModel": {  # 5B
        "num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True,
    },
    "ConsisIDTransformer3DModel": {
        "num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True,
        "in_channels": 32, "is_train_face": True,
    },
    "UNet2DConditionModel": {  # SDXL
        "sample_size": 128, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16,
        "num_single_layers": 32, "attention_head_dim": 128, "num_attention_heads": 20,
        "caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4,
        "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
        "llama_layers": [*range(32), *[31] * 16],
    },
    "CogView4Transformer2DModel": {
        "attention_head_dim": 128, "num_attention_heads": 32, "num_layers": 28,
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2,
        "sample_size": 128, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
        "learn_sigma": True, "use_style_cond_and_image_meta_size": False,
    },
    "LuminaNextDiT2DModel": {"num_layers": 24, "num_kv_heads": 8},
    "Transformer2DModel": {  # VQ-Diffusion
        "num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 36, "sample_size": 32,
        "num_vector_embeds": 4097, "cross_attention_dim": 512, "norm_type": "ada_norm",
        "num_embeds_ada_norm": 100, "attention_bias": True, "activation_fn": "geglu-approximate",
    },
    "EasyAnimateTransformer3DModel": {
        "patch_size": 2, "text_embed_dim": 3584, "in_channels": 16, "out_channels": 16,
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True,
    },
    "LatteTransformer3DModel": {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "num_layers": 28, "patch_size": 2, "sample_size": 64, "caption_channels": 4096,
        "cross_attention_dim": 1152, "video_length": 16, "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "attention_bias": True,
        "activation_fn": "gelu-approximate",
    },
}  # fmt: skip
"""Denoiser class -> what its published configuration says beside the defaults of the class."""


class Expected(NamedTuple):
    """What a plan says of one call at native size.

    Args:
        latents: Elements (h, w), or (f, h, w) of a video.
        text: Text tokens, joint or cross-attended.
        grid: Visual tokens of the longest layer.
        length: All its tokens.
        layers: Layers that a method may serve.
        heads: H of the longest layer.
        dim: D of the longest layer.
    """

    latents: tuple[int, ...]
    text: int
    grid: tuple[int, int, int]
    length: int
    layers: int
    heads: int
    dim: int


PLANS: dict[str, Expected] = {
    "FluxTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 57, 24, 128),
    "SD3Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 24, 24, 64),
    "QwenImageTransformer2DModel": Expected((166, 166), 512, (1, 83, 83), 7401, 60, 24, 128),
    "WanTransformer3DModel": Expected((21, 90, 160), 512, (21, 45, 80), 75600, 40, 40, 128),
    "HunyuanVideoTransformer3DModel": Expected(
        (33, 90, 160), 512, (33, 45, 80), 119312, 60, 24, 128
    ),
    "CogVideoXTransformer3DModel": Expected((13, 60, 90), 512, (13, 30, 45), 18062, 42, 48, 64),
    "LTXVideoTransformer3DModel": Expected((21, 16, 22), 128, (21, 16, 22), 7392, 28, 32, 64),
    "UNet2DConditionModel": Expected((128, 128), 77, (1, 64, 64), 4096, 70, 10, 64),
    "Flux2Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 56, 48, 128),
    "Flux3Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 33, 24, 128),
    "ChromaTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 57, 24, 128),
    "Krea2Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 28, 48, 128),
    "LongCatImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 57, 24, 128),
    "OvisImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 33, 24, 128),
    "BriaTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 57, 24, 128),
    "BriaFiboTransformer2DModel": Expected((64, 64), 512, (1, 64, 64), 4608, 57, 24, 128),
    "AuraFlowTransformer2DModel": Expected((64, 64), 512, (1, 32, 32), 1544, 36, 12, 256),
    "ErnieImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 24, 24, 128),
    "GlmImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 30, 64, 40),
    "Ideogram4Transformer2DModel": Expected((256, 256), 512, (1, 128, 128), 16896, 34, 18, 256),
    "OmniGenTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4609, 32, 32, 96),
    "ZImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 32, 30, 128),
    "Lumina2Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 28, 24, 96),
    "HunyuanImageTransformer2DModel": Expected((64, 64), 512, (1, 64, 64), 4608, 60, 28, 128),
    "QwenImage21Transformer2DModel": Expected((64, 64), 512, (1, 64, 64), 4608, 32, 32, 128),
    "HiDreamImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 5632, 48, 20, 128),
    "CogView4Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 28, 32, 128),
    "CogView3PlusTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 30, 64, 40),
    "PixArtTransformer2DModel": Expected((128, 128), 300, (1, 64, 64), 4096, 28, 16, 72),
    "HunyuanDiT2DModel": Expected((128, 128), 77, (1, 64, 64), 4096, 40, 16, 88),
    "DiTTransformer2DModel": Expected((32, 32), 512, (1, 16, 16), 256, 28, 16, 72),
    "LuminaNextDiT2DModel": Expected((128, 128), 256, (1, 64, 64), 4096, 24, 32, 72),
    "PRXTransformer2DModel": Expected((64, 64), 512, (1, 32, 32), 1536, 16, 28, 64),
    "NucleusMoEImageTransformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 24, 16, 128),
    "JoyImageEditTransformer3DModel": Expected((128, 128), 512, (1, 64, 64), 4608, 20, 24, 128),
    "JoyImageEditPlusTransformer3DModel": Expected(
        (128, 128), 512, (1, 64, 64), 4608, 20, 24, 128
    ),
    "Kandinsky3UNet": Expected((128, 128), 128, (1, 64, 64), 4096, 6, 6, 64),
    "UVit2DModel": Expected((64, 64), 77, (1, 64, 64), 4096, 22, 16, 64),
    "Transformer2DModel": Expected((32, 32), 77, (1, 32, 32), 1024, 36, 16, 64),
    "WanVACETransformer3DModel": Expected((21, 90, 160), 512, (21, 45, 80), 75600, 40, 40, 128),
    "WanAnimateTransformer3DModel": Expected((21, 90, 160), 512, (21, 45, 80), 75600, 40, 40, 128),
    "SkyReelsV2Transformer3DModel": Expected((25, 68, 120), 512, (25, 34, 60), 51000, 32, 16, 128),
    "ChronoEditTransformer3DModel": Expected((8, 90, 160), 512, (8, 45, 80), 28800, 40, 40, 128),
    "AnyFlowTransformer3DModel": Expected((21, 60, 104), 512, (21, 30, 52), 32760, 40, 40, 128),
    "AnyFlowFARTransformer3DModel": Expected((21, 60, 104), 512, (21, 30, 52), 32768, 40, 40, 128),
    "HunyuanVideo15Transformer3DModel": Expected(
        (31, 30, 53), 512, (31, 30, 53), 50787, 54, 16, 128
    ),
    "HunyuanVideoFramepackTransformer3DModel": Expected(
        (9, 90, 160), 512, (9, 45, 80), 42721, 60, 24, 128
    ),
    "MotifVideoTransformer3DModel": Expected(
        (31, 92, 160), 512, (31, 46, 80), 114592, 60, 24, 128
    ),
    "HeliosTransformer3DModel": Expected((9, 48, 80), 512, (9, 24, 40), 11040, 40, 40, 128),
    "LTX2VideoTransformer3DModel": Expected((16, 16, 24), 1024, (16, 16, 24), 6144, 48, 32, 128),
    "CosmosTransformer3DModel": Expected((16, 88, 160), 512, (16, 44, 80), 56320, 28, 32, 128),
    "MochiTransformer3DModel": Expected((28, 60, 106), 512, (28, 30, 53), 45032, 48, 24, 128),
    "EasyAnimateTransformer3DModel": Expected((13, 60, 90), 512, (13, 30, 45), 18062, 48, 48, 64),
    "AllegroTransformer3DModel": Expected((22, 90, 160), 512, (22, 45, 80), 79200, 32, 24, 96),
    "LatteTransformer3DModel": Expected((64, 64), 120, (1, 32, 32), 1024, 28, 16, 72),
    "ConsisIDTransformer3DModel": Expected((13, 60, 90), 512, (13, 30, 45), 18062, 42, 48, 64),
    "UNetMotionModel": Expected((64, 64), 77, (1, 64, 64), 4096, 16, 8, 40),
    "UNetSpatioTemporalConditionModel": Expected((1, 72, 128), 1, (1, 72, 128), 9216, 16, 5, 64),
    "UNet3DConditionModel": Expected((32, 32), 77, (1, 32, 32), 1024, 16, 5, 64),
    "I2VGenXLUNet": Expected((88, 160), 77, (1, 88, 160), 14080, 16, 5, 64),
    "StableCascadeUNet": Expected((24, 24), 512, (1, 24, 24), 580, 64, 32, 64),
    "UNetControlNetXSModel": Expected((96, 96), 77, (1, 96, 96), 9216, 16, 8, 40),
    "Cosmos3OmniTransformer": Expected((48, 46, 80), 512, (48, 23, 40), 44672, 36, 32, 128),
    "MiniMaxH3Transformer3DModel": Expected((37, 48, 84), 512, (37, 24, 42), 37993, 50, 56, 128),
    "BriaFibo2Transformer2DModel": Expected((128, 128), 512, (1, 64, 64), 4416, 46, 28, 128),
    "Kandinsky5Transformer3DModel": Expected((31, 64, 96), 512, (31, 32, 48), 47616, 32, 32, 64),
    "Kandinsky6Transformer3DModel": Expected((31, 64, 96), 1024, (31, 32, 48), 47616, 60, 32, 128),
    "DreamLiteUNetModel": Expected((128, 128), 77, (1, 32, 64), 2048, 6, 64, 20),
}
"""Denoiser class -> its tokens and attention at full size."""
