"""Calls that have no layout in common, or hide it: they run as stock, and say why."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor
from tiny_models import MODELS
from tiny_models.base import lengths, noise

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.state import as_padding_mask
from diffaccel.bindings.qwen_image21 import QwenImage21Binding
from diffaccel.layout import TokenLayout
from diffaccel.methods import RectifiedSpaAttn

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = RectifiedSpaAttn(
    drop=0.5, p_remain=0.0, neighbors=False, block=16, first_frame=False, dense_steps=0,
    dense_layers=(),
)  # fmt: skip


def texts_of_two_lengths(tiny):
    return {"encoder_attention_mask": lengths(6, 6, 4).long()}


def captions_of_two_lengths(tiny):
    long = [noise(40, 16, seed=3), noise(5, 16)]
    return {"cap_feats": [long, tiny.arguments["cap_feats"][1]]}


def images_of_two_sizes(tiny):
    return {"x": [noise(4, 1, 10, 26), noise(4, 1, 12, 26)]}


def targets_of_two_sizes(tiny):
    return {"shape_list": [[(1, 5, 13), (1, 3, 4)], [(1, 4, 13), (1, 2, 3)]]}


UNEVEN = {
    "Lumina2Transformer2DModel": texts_of_two_lengths,
    "ZImageTransformer2DModel:omni": captions_of_two_lengths,
    "ZImageTransformer2DModel": images_of_two_sizes,
    "JoyImageEditPlusTransformer3DModel": targets_of_two_sizes,
}


@pytest.mark.parametrize("name", UNEVEN)
@torch.no_grad()
def test_samples_without_a_common_layout_run_as_stock(name):
    tiny = MODELS[name]()
    arguments = tiny.arguments | UNEVEN[name](tiny)
    expected = tiny.model(**arguments, return_dict=False)[0]
    with (
        pytest.warns(UserWarning, match="of the samples"),
        set_attn_processor(tiny.model, HALF, always=True) as attachment,
    ):
        output = tiny.model(**arguments, return_dict=False)[0]
        layers = attachment.report().denoisers[0].layers
    joint = [layer for layer in layers if layer.kind == "joint"]
    assert joint and all(not layer.sparse_calls for layer in joint)
    assert all("of the samples" in next(iter(layer.dense_calls)) for layer in joint)
    # The refiners of Lumina 2 and Omni see images alone, which are alike.
    refined = any(layer.sparse_calls for layer in layers)
    assert refined == (name in ("Lumina2Transformer2DModel", "ZImageTransformer2DModel:omni"))
    same = all(map(torch.equal, output, expected))
    assert same != refined


def test_the_processor_of_flex_attention_runs_as_stock():
    tiny = MODELS["QwenImage21Transformer2DModel"]()
    tiny.model.set_attn_processor(QwenImage21FlexAttnProcessor())
    stock = tiny.predict()
    with (
        pytest.warns(UserWarning, match="ran dense"),
        set_attn_processor(tiny.model, HALF, always=True),
    ):
        assert torch.equal(tiny.predict(), stock)


def test_hidream_from_patches_runs_as_stock():
    tiny = MODELS["HiDreamImageTransformer2DModel"]()
    latents, _, _, ids = tiny.model.patchify(tiny.arguments["hidden_states"])
    arguments = tiny.arguments | {
        "hidden_states": latents,
        "hidden_states_masks": torch.ones(2, latents.shape[1]),
        "img_ids": ids,
        "img_sizes": [(5, 13)] * 2,
    }
    stock = tiny.predict(arguments)
    with (
        pytest.warns(UserWarning, match="do not tell their grid"),
        set_attn_processor(tiny.model, HALF, always=True),
    ):
        assert torch.equal(tiny.predict(arguments), stock)


def test_a_wrong_layout_is_told_where_text_attends_apart(monkeypatch):
    tiny = MODELS["QwenImage21Transformer2DModel"]()
    stock = tiny.predict()
    wrong = TokenLayout.image(9, 14, text_before=5)
    monkeypatch.setattr(QwenImage21Binding, "layout", lambda *_: wrong)
    with set_attn_processor(tiny.model, HALF, always=True) as attachment:
        assert torch.equal(tiny.predict(), stock)
        layers = attachment.report().denoisers[0].layers
    assert all(layer.dense_calls and not layer.sparse_calls for layer in layers)


def test_an_expanded_mask_is_not_compared():
    """Lumina-Next expands (B, 1, 1, N) to every head and row: only one of them is looked at."""
    mask = lengths(5, 5, 3)[:, None, None].expand(-1, 4, 5, -1)
    assert torch.equal(as_padding_mask(mask, 2, 5), lengths(5, 5, 3))
    on_meta = torch.ones(2, 1, 1, 5, dtype=torch.bool, device="meta").expand(-1, 4, 5, -1)
    assert as_padding_mask(on_meta, 2, 5).shape == (2, 5)  # comparing would fail without values
