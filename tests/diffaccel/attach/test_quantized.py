"""Quantised and cast weights: a method gets what the stock layers compute."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from diffaccel import FullAttn, SparseAttn, set_attn_processor

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def quanto_int8(model):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


def stored_in_fp8(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


QUANTISED = [
    pytest.param(torchao_int8, id="torchao", marks=needs("torchao")),
    pytest.param(quanto_int8, id="quanto", marks=needs("optimum")),
    pytest.param(stored_in_fp8, id="fp8 storage"),
]


def dequantised(model):
    """Writes the weights that a quantised model computes with into one of the same class."""
    plain = {}
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            whole = weight.dequantize() if hasattr(weight, "dequantize") else weight
            plain[f"{name}.{key}".lstrip(".")] = whole.detach().float().clone()
    return plain


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize(
    "name",
    ["flux", "sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan2.2", "sd3"))],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_full_attention_is_stock_and_sparse_that_of_the_same_weights(
    tiny_pipelines, name, quantise, when
):
    tiny, plain = (tiny_pipelines.BUILDERS[name]() for _ in range(2))
    if when == "before":
        set_attn_processor(tiny.pipe, FullAttn())
    for model in tiny.denoisers().values():
        quantise(model)
    if when == "after":
        set_attn_processor(tiny.pipe, FullAttn())
    full = tiny.sample()
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    sparse = tiny.sample()
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    attachment.remove()
    stock = tiny.sample()
    assert torch.equal(full, stock)
    assert (stock - plain.sample()).norm() > 0  # it is quantised

    for part, model in tiny.denoisers().items():
        twin: nn.Module = getattr(plain.pipe, part)
        twin.load_state_dict(dequantised(model), strict=False)
    reference = plain.sample()
    assert (stock - reference).norm() < 1e-4 * reference.norm()
    with set_attn_processor(plain.pipe, METHOD, always=True):
        reference = plain.sample()
    # blocks that are chosen by a hair may change places
    assert (sparse - reference).norm() < 1e-2 * reference.norm()
