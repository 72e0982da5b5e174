"""Teaches diffaccel a model that it does not know: a denoiser of one attention over patches.

The model is no network but non-local means, so that its picture can be judged without training:
every patch of a noisy picture becomes the mean of the patches that resemble it.

Run: .venv/bin/python samples/own_model.py
"""

from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

from diffaccel import RectifiedSpaAttn, TokenLayout, set_attn_processor
from diffaccel.bindings import BINDINGS, AttentionLayer, Binding, ModelCall
from diffaccel.quality.contact_sheet import grid

PATCH = 4
CHANNELS = 3 * PATCH**2
SHARPNESS = 2.5  # more: means over patches that are more alike


class PatchDenoiser(nn.Module):
    """Maps a picture (1, 3, H, W) to its patches' means over their likes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(CHANNELS, heads=1, dim_head=CHANNELS, qk_norm="layer_norm")
        projections = (self.attn.to_q, self.attn.to_k, self.attn.to_v, self.attn.to_out[0])
        for layer in projections:
            layer.weight.data = torch.eye(CHANNELS)
        self.attn.to_out[0].bias.data.zero_()
        for norm in (self.attn.norm_q, self.attn.norm_k):
            norm.weight.data.fill_(SHARPNESS)

    def forward(self, sample: Tensor) -> Tensor:
        patches = nn.functional.pixel_unshuffle(sample, PATCH)
        means = self.attn(patches.flatten(2).mT.contiguous())
        return nn.functional.pixel_shuffle(means.mT.reshape(patches.shape), PATCH)


class PatchBinding(Binding):
    """What diffaccel has to know: which layers attend over the picture, and its grid of tokens."""

    patterns = ((r"attn", "self"),)

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = call["sample"].shape[-2:]
        return TokenLayout.image(height // PATCH, width // PATCH)


BINDINGS["PatchDenoiser"] = PatchBinding()

apple = Image.open(Path(__file__).parent / "pictures" / "apple.jpg").crop((40, 40, 552, 552))
pixels = bytearray(apple.convert("RGB").resize((256, 256)).tobytes())
truth = torch.frombuffer(pixels, dtype=torch.uint8).view(1, 256, 256, 3)
truth = truth.permute(0, 3, 1, 2) / 127.5 - 1
noisy = truth + 0.25 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
model = PatchDenoiser().eval()
methods = {
    "pooled": RectifiedSpaAttn(drop=0.8),
    "centroids": RectifiedSpaAttn(drop=0.8, correction="centroids"),
}
with torch.inference_mode():
    shown = {"noisy": noisy, "dense": model(noisy)}
    for name, method in methods.items():
        with set_attn_processor(model, method, always=True) as attachment:
            shown[name] = model(noisy)
            print(attachment.report())
pictures = [
    Image.fromarray((127.5 * x[0] + 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy())
    for x in shown.values()
]
grid(pictures, len(shown), list(shown)).save("own_model.png")
