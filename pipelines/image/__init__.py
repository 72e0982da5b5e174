"""Generating pictures beyond the size on which a model was trained."""

from diffaccel.pipelines.image.generate import (
    GeneratedImage,
    check_size,
    generate_image,
    plan_stages,
    refine_image,
)

__all__ = ["GeneratedImage", "check_size", "generate_image", "plan_stages", "refine_image"]
