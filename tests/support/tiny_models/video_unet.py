"""U-Nets for video: the frames are rows of the batch, attention along time is apart."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise

TOP, DEEP = (TokenLayout.image(*size) for size in ((9, 14), (5, 7)))
LAYOUTS = {
    r"(down_blocks\.0|up_blocks\.1)\.attentions\..*transformer_blocks\.\d\.attn1": TOP,
    r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\..*transformer_blocks\.\d\.attn1": DEEP,
}
VIDEO: dict[str, Any] = {
    "grid": (3, 9, 14), "latents": "sample", "axes": "bcfhw", "is_local": False,
    "latent_size": (3, 9, 14), "text": 6,
}  # fmt: skip


def animatediff(splits: bool = False) -> TinyModel:
    """AnimateDiff: motion modules after each block; split inference runs frames in chunks."""
    model = built(
        diffusers.UNetMotionModel, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlockMotion",) * 2, block_out_channels=(8, 16),
        up_block_types=("CrossAttnUpBlockMotion",) * 2, layers_per_block=1, norm_num_groups=2,
        cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )  # fmt: skip
    motion = sum("motion_modules" in name and name.endswith(("attn1", "attn2"))
                 for name, _ in model.named_modules())  # fmt: skip
    if splits:
        pipe = AnimateDiffFreeNoiseMixin()
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            pipe._enable_split_inference_attentions_(block.attentions, 2)
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 3, 9, 14), "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 6, 16, seed=2).repeat_interleave(3, 0),
        },
        layouts=LAYOUTS, skipped=7 + motion, **VIDEO,
    )  # fmt: skip


def stable_video() -> TinyModel:
    """Stable Video Diffusion: latents with frames before channels."""
    model = built(
        diffusers.UNetSpatioTemporalConditionModel, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2, block_out_channels=(32, 32),
        layers_per_block=1, cross_attention_dim=16, num_attention_heads=(2, 2),
        projection_class_embeddings_input_dim=12, addition_time_embed_dim=4,
    )  # fmt: skip
    layouts = {
        key.replace(r"\..*transformer", r"\.\d\.transformer"): value
        for key, value in LAYOUTS.items()
    }
    return TinyModel(
        model,
        {
            "sample": noise(2, 3, 4, 9, 14), "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 1, 16, seed=2), "added_time_ids": noise(2, 3),
        },
        layouts=layouts, skipped=21, **(VIDEO | {"axes": "bfchw", "text": 1}),
    )  # fmt: skip


def modelscope() -> TinyModel:
    """ModelScope: temporal attention beside each spatial one."""
    model = built(
        diffusers.UNet3DConditionModel, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D",) * 2, up_block_types=("CrossAttnUpBlock3D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 3, 9, 14), "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
        },
        layouts=LAYOUTS, skipped=7 + 16, **VIDEO,
    )  # fmt: skip


def i2vgen() -> TinyModel:
    """I2VGen-XL: as ModelScope, with a picture to begin with."""
    model = built(
        diffusers.I2VGenXLUNet, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D",) * 2, up_block_types=("CrossAttnUpBlock3D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 3, 9, 14), "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 6, 16, seed=2), "fps": torch.tensor([16, 16]),
            "image_latents": noise(2, 4, 3, 9, 14, seed=5), "image_embeddings": noise(2, 16),
        },
        layouts=LAYOUTS, skipped=7 + 17, **VIDEO,
    )  # fmt: skip


MODELS = {
    "UNetMotionModel": animatediff,
    "UNetMotionModel:split": lambda: animatediff(splits=True),
    "UNetSpatioTemporalConditionModel": stable_video,
    "UNet3DConditionModel": modelscope,
    "I2VGenXLUNet": i2vgen,
}
