"""Makes a stock diffusers pipeline sparse with one line, and prints what the method did.

Run: .venv/bin/python samples/one_line.py
"""

import torch
from diffusers import FluxPipeline

import diffaccel
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE

pipe = FluxPipeline.from_pretrained(EMBEDDED_IMAGE, dtype=torch.float32)
attachment = pipe.set_attn_processor(diffaccel.RectifiedSpaAttn(drop=0.75))
image = pipe(
    "a red apple on a blue background",
    negative_prompt="",
    true_cfg_scale=4.0,
    num_inference_steps=8,
    max_sequence_length=32,
    height=512,
    width=512,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("one_line.png")
print(attachment.report())
attachment.remove()
