"""Loading pipelines on a CPU."""

import torch
from diffusers import DiffusionPipeline

from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.loading import load_image_pipeline


@torch.no_grad()
def test_convolutions_are_laid_out_for_the_cpu_and_compute_the_same():
    pipe = load_image_pipeline(device="cpu")
    stock = DiffusionPipeline.from_pretrained(EMBEDDED_IMAGE, dtype=torch.float32)
    weight = pipe.vae.decoder.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    latents = torch.randn(1, 8, 8, 12)
    torch.testing.assert_close(
        pipe.vae.decode(latents).sample, stock.vae.decode(latents).sample, atol=1e-4, rtol=1e-4
    )
