"""Attends with plain tensors, no model: where does each method err, and how much is computed?

Run: .venv/bin/python samples/without_diffusers.py
"""

import torch
from PIL import Image

from diffaccel import FullAttn, RectifiedSpaAttn, SparseAttn, TokenLayout
from diffaccel.quality.contact_sheet import grid

SIDE, TEXT, HEADS, DIM = 64, 16, 2, 32
METHODS = {
    "SparseAttn": SparseAttn(keep=0.2, block=64),
    "rectified": RectifiedSpaAttn(drop=0.8, p_remain=0.0, block=64),
    "centroids": RectifiedSpaAttn(drop=0.8, p_remain=0.0, block=64, correction="centroids"),
}

# Tokens that resemble their neighbours, as those of pictures do; text comes first.
noise = torch.randn(3, HEADS * DIM, 10, 10, generator=torch.Generator().manual_seed(0))
smooth = torch.nn.functional.interpolate(noise, size=(SIDE, SIDE), mode="bicubic")
visual = smooth.flatten(2).mT.unflatten(2, (HEADS, DIM))
text = torch.randn(3, TEXT, HEADS, DIM, generator=torch.Generator().manual_seed(1))
query, key, value = torch.cat([text, visual], 1).split(1)  # (1, N, H, D) each
key = 0.5 * query + key  # tokens attend what resembles them
value = 1 + value  # and have something in common
layout = TokenLayout.image(SIDE, SIDE, text_before=TEXT)

exact = FullAttn().attend(query, key, value, layout)
maps = []
for name, method in METHODS.items():
    output, density = method.attend_with_density(query, key, value, layout)
    error = (output - exact).norm(dim=(2, 3))[0] / exact.norm(dim=(2, 3)).mean()
    print(f"{name}: {float(density):.0%} of all pairs, mean error {error.mean():.3f}")
    picture = (
        (1000 * error[TEXT:].unflatten(0, (SIDE, SIDE))).clamp(max=255).byte()
    )  # white: a quarter
    maps.append(Image.fromarray(picture.numpy()).resize((256, 256), Image.Resampling.NEAREST))
grid([picture.convert("RGB") for picture in maps], 3, list(METHODS)).save("without_diffusers.png")
