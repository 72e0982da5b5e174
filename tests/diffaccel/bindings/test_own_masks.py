"""Video models that mask, cache or choose blocks themselves: what reaches methods."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_models import MODELS
from tiny_models.base import built
from tiny_models.kandinsky import SMALL, places
from torch.utils._python_dispatch import TorchDispatchMode

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.state import as_padding_mask
from diffaccel.methods import FullAttn, RectifiedSpaAttn

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = RectifiedSpaAttn(drop=0.5, block=16, dense_steps=0, dense_layers=(), first_frame=False)


class LargestMask(TorchDispatchMode):
    """Notes how many bytes the largest bool tensor takes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.bool:
            self.size = max(self.size, output.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("method", [FullAttn(), SPARSE], ids=["full", "sparse"])
def test_hunyuan_video_15_builds_no_mask_of_all_pairs(method):
    tiny = MODELS["HunyuanVideo15Transformer3DModel:image"]()
    pairs = 2 * (135 + 18) ** 2
    with LargestMask() as stock:
        tiny.predict()
    with set_attn_processor(tiny.model, method, always=True), LargestMask() as attached:
        tiny.predict()
    assert stock.size == pairs
    assert attached.size < pairs / 8


def dense_reasons(model, arguments):
    """Why the layers ran dense, and whether the output is that of the stock model."""
    with torch.no_grad():
        stock = model(**arguments)[0]
        with (
            pytest.warns(UserWarning, match="ran dense"),
            set_attn_processor(model, SPARSE, always=True) as attachment,
        ):
            output = model(**arguments)[0]
    same = stock is None or torch.equal(output, stock)
    layers = attachment.report().denoisers[0].layers
    return same, {reason for layer in layers for reason in layer.dense_calls}, layers


def test_causal_blocks_of_frames_run_dense():
    tiny = MODELS["SkyReelsV2Transformer3DModel:forcing"]()
    tiny.model._set_ar_attention(1)
    assert not dense_free(tiny)  # a block for each frame is no mask at all
    tiny.model._set_ar_attention(3)
    assert not dense_free(tiny)
    six = {
        **tiny.arguments,
        "hidden_states": tiny.arguments["hidden_states"].repeat(1, 1, 2, 1, 1),
        "timestep": tiny.arguments["timestep"].repeat(1, 2),
    }
    same, reasons, _ = dense_reasons(tiny.model, six | {"return_dict": False})
    assert same and reasons == {"frames attend causally, in blocks of 3"}


def dense_free(tiny):
    """Returns why layers ran dense in a call of a tiny model."""
    with set_attn_processor(tiny.model, SPARSE, always=True) as attachment:
        tiny.predict()
    return [
        layer.dense_calls for layer in attachment.report().denoisers[0].layers if layer.dense_calls
    ]


@pytest.mark.slow
def test_blocks_that_kandinsky_chooses_are_its_own():
    model = built(diffusers.Kandinsky5Transformer3DModel, **SMALL)
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "flex"
    sparse = {"sta_mask": torch.eye(4, dtype=torch.bool)[None, None], "P": 0.5, "to_fractal": True}
    same, reasons, layers = dense_reasons(
        model,
        {
            "hidden_states": torch.randn(1, 2, 16, 32, 4), "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.randn(1, 6, 16), "text_rope_pos": torch.arange(6),
            "pooled_projections": torch.randn(1, 8), "return_dict": False,
            "visual_rope_pos": places([0, 1], [*range(8)], [*range(16)]),
            "sparse_params": sparse,
        },
    )  # fmt: skip
    assert same and reasons == {"the model leaves out blocks of its own choice (NABLA)"}
    assert all(sum(layer.dense_calls.values()) == 1 for layer in layers)


@pytest.mark.slow
def test_a_chunk_that_is_kept_for_later_ones_runs_dense():
    tiny = MODELS["AnyFlowFARTransformer3DModel:first"]()
    flag = {"num_cached_chunks": 0, "is_cache_step": True}
    caching = {**tiny.arguments, "kv_cache_flag": flag, "return_dict": False}
    _, reasons, _ = dense_reasons(tiny.model, caching)
    assert reasons == {"chunks of frames attend causally"}


def test_layers_that_stay_have_their_reason():
    def reasons(name):
        model = MODELS[name]().model
        with set_attn_processor(model, SPARSE) as attachment:
            return set(attachment.report().denoisers[0].skipped.values())

    assert reasons("WanVACETransformer3DModel") == {"cross-attention", "control block"}
    assert "cross-attention to the face" in reasons("WanAnimateTransformer3DModel")
    assert reasons("Kandinsky6Transformer3DModel:sound") == {
        "cross-attention", "sound", "attention between video and sound",
        "attention within the text",
    }  # fmt: skip


def test_masks_that_are_expanded_are_key_padding():
    keys = torch.tensor([[True, True, False]])
    mask = keys[:, None, None].expand(1, 2, 3, 3)
    assert torch.equal(as_padding_mask(mask, 1, 3), keys)


@pytest.mark.slow
def test_flex_attention_is_not_run_without_a_compiler_inside_a_compiled_model(monkeypatch):
    """AnyFlow FAR asks for it by name; uncompiled, it holds the scores of all pairs."""
    tiny = MODELS["AnyFlowFARTransformer3DModel"]()
    stock = tiny.predict()

    def refuse(*_, **__):
        raise AssertionError("FlexAttention ran")

    with set_attn_processor(tiny.model, FullAttn()):
        monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", refuse)
        tiny.model.compile(backend="eager")
        torch.testing.assert_close(tiny.predict(), stock, rtol=1e-4, atol=1e-5)
