"""Whole tiny pipelines of the families that redraw through a codec, built offline.

Each file holds one kind of pipeline and a table `BUILDERS`: name -> builder. A pipeline that is
run in several ways (PRX, with either autoencoder) has one name for each: `Class`, `Class:way`.
"""

from __future__ import annotations

from tiny_image_pipelines import diffusion, joint, packed
from tiny_image_pipelines.base import Builder, TinyImagePipeline

__all__ = ["BUILDERS", "Builder", "TinyImagePipeline"]

BUILDERS: dict[str, Builder] = {**packed.BUILDERS, **joint.BUILDERS, **diffusion.BUILDERS}
