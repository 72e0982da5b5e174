"""Full-size configurations of the denoisers: the published ones, or defaults of the classes."""

from __future__ import annotations

from typing import Any

_TOKENS: dict[str, Any] = {"attention_bias": True, "activation_fn": "gelu-approximate"}

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
    "EasyAnimateTransformer3DModel": {"patch_size": 2, "text_embed_dim": 3584},
    "LatteTransformer3DModel": {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "num_layers": 28, "patch_size": 2, "sample_size": 64, "caption_channels": 4096,
        "cross_attention_dim": 1152, "video_length": 16, "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "attention_bias": True,
        "activation_fn": "gelu-approximate",
    },
}  # fmt: skip
"""Denoiser class -> what its published configuration says beside the defaults of the class."""
