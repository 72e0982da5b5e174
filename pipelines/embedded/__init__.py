"""The models in this package, as stock diffusers and transformers folders."""

from pathlib import Path

_HERE = Path(__file__).parent
EMBEDDED_IMAGE = _HERE / "image"
"""A `FluxPipeline`."""
EMBEDDED_UNET = _HERE / "unet"
"""A `StableDiffusionPipeline`."""
EMBEDDED_VIDEO = _HERE / "video"
"""A `WanPipeline`."""
EMBEDDED_SCORER = _HERE / "scorer"
"""A `CLIPModel` with tokenizer and image processor, for `PromptMatch`."""
