"""Models that the table does not hold: subclasses, and the example of CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from tiny_models import MODELS
from tiny_models.base import window_mask
from torch import nn

from diffaccel import NeighborhoodAttn, TokenLayout, set_attn_processor
from diffaccel.bindings import BINDINGS, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")
CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


class YourModel(nn.Module):
    """Two blocks of attention over patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": Attention(16, heads=2, dim_head=8)}) for _ in "ab"
        )

    def forward(self, sample):
        tokens = self.embed(sample).flatten(2).mT
        for block in self.blocks:
            tokens = tokens + block["attn"](tokens)
        return tokens


@pytest.fixture
def example(monkeypatch):
    """Runs the first example of CONTRIBUTING.md, and takes its binding out of the table again."""
    (code, *_) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    monkeypatch.setitem(BINDINGS, "YourModel", None)
    monkeypatch.delitem(BINDINGS, "YourModel")
    return code


@torch.no_grad()
def test_the_shortest_binding_serves_a_model(example, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, sample = YourModel().eval(), torch.randn(2, 3, 10, 18)
    with pytest.raises(UnsupportedModelError, match="no binding knows") as caught:
        set_attn_processor(model, NeighborhoodAttn((1, 3, 3)))
    for said in ('BINDINGS["YourModel"]', "`patterns`", "`layout`", "CONTRIBUTING.md"):
        assert said in str(caught.value)
    exec(example, {"__name__": "example"})
    stock = model(sample)
    with set_attn_processor(model, NeighborhoodAttn((1, 3, 3)), always=True) as attachment:
        found = model(sample)
        assert [layer.sparse_calls for layer in attachment.report().layers] == [1, 1]
    assert torch.equal(model(sample), stock)
    window = window_mask(TokenLayout.image(5, 9), blind_text=False)
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **options: plain(q, k, v, attn_mask=window, **options),
    )  # fmt: skip
    torch.testing.assert_close(found, model(sample), rtol=1e-4, atol=2e-5)


def test_a_subclass_is_served_like_its_parent():
    class Finetuned(diffusers.FluxTransformer2DModel):
        pass

    tiny = MODELS["FluxTransformer2DModel"]()
    tiny.model.__class__ = Finetuned
    with set_attn_processor(tiny.model, NeighborhoodAttn((1, 3, 3)), always=True) as attachment:
        tiny.predict()
        layers = attachment.report().denoisers[0].layers
    assert layers and all(layer.sparse_calls == 1 for layer in layers)


def test_a_subclass_with_other_layers_is_told_to_have_a_binding_of_its_own():
    class Renamed(diffusers.FluxTransformer2DModel):
        pass

    model = MODELS["FluxTransformer2DModel"]().model
    model.__class__ = Renamed
    model.others = model.transformer_blocks
    del model.transformer_blocks, model.single_transformer_blocks
    with pytest.raises(UnsupportedModelError, match=r'BINDINGS\["Renamed"\] = YourBinding'):
        set_attn_processor(model, NeighborhoodAttn((1, 3, 3)))
