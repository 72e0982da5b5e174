"""Guides a U-Net without a second prompt: away from what it draws with one layer blinded.

Run: .venv/bin/python samples/guidance.py
"""

import torch
from diffusers import StableDiffusionPipeline

from diffaccel import HeadPerturbation
from diffaccel.pipelines.embedded import EMBEDDED_UNET
from diffaccel.quality.contact_sheet import grid

PROMPTS = ["a rocket on a blue background", "a penguin on a teal background"]

pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED_UNET, safety_checker=None)


def draw() -> list:
    """Draws all prompts without classifier-free guidance, always from the same noise."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=10, guidance_scale=1.0, generator=seeds).images


plain = draw()
with pipe.set_guidance(HeadPerturbation(layers=(4,)), scale=3.0) as guidance:
    guided = draw()
print(guidance.report())
labels = ["without", "without", "guided", "guided"]
grid([*plain, *guided], len(PROMPTS), labels).save("guidance.png")
