"""Every bound denoiser class: a block that is left out hands on what the block would."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS

from diffaccel.bindings import binding_of
from diffaccel.guidance.guide import on_batch
from diffaccel.guidance.perturb.blocks import pass_through
from diffaccel.guidance.perturb.shared_prefix import _copied, _rows_of

pytestmark = pytest.mark.usefixtures("one_thread")
BINDINGS = {name: binding_of(build().model) for name, build in MODELS.items()}
GUIDED = [name for name, binding in BINDINGS.items() if not binding.unguided]
BATCHED = [name for name in GUIDED if BINDINGS[name].batches_prompts]


@pytest.mark.parametrize("name", MODELS)
def test_a_block_that_is_left_out_returns_tensors_in_the_places_of_the_stock_ones(name):
    tiny = MODELS[name]()
    binding = binding_of(tiny.model)
    checked = []

    def compare(block, args, kwargs, output):
        given = pass_through(block, binding)(*args, **kwargs)
        found, expected = (x if isinstance(x, tuple) else (x,) for x in (given, output))
        assert len(found) == len(expected)
        for ours, stock in zip(found, expected, strict=True):
            assert stock is None or ours.shape == stock.shape  # the last block drops its text
        checked.append(block)

    blocks = {layer.block for layer in binding.layers(tiny.model)}
    handles = [
        tiny.model.get_submodule(block).register_forward_hook(compare, with_kwargs=True)
        for block in blocks
    ]
    tiny.predict()
    for handle in handles:
        handle.remove()
    assert len(set(checked)) == len(blocks)


@pytest.mark.parametrize("name", BATCHED)
def test_stages_split_by_samples(name):
    """What a stage returns for some samples are those rows of what it returns for all."""
    tiny = MODELS[name]()
    returned = []

    def keep(module, args, output):
        returned.append(_copied(output))

    for stage in binding_of(tiny.model).stages(tiny.model):
        tiny.model.get_submodule(stage).register_forward_hook(keep)
    count = len(tiny.predict())
    whole = [_rows_of(output, slice(1, 2), count) for output in returned]
    returned.clear()
    tiny.predict(on_batch(tiny.arguments, count, lambda t: t[1:]))
    torch.testing.assert_close(returned, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_listed_in_the_order_in_which_they_run(name):
    """Guidance takes what comes before the first damaged layer from the sound model."""
    tiny = MODELS[name]()
    layers = [layer.name for layer in binding_of(tiny.model).layers(tiny.model)]
    ran = []
    for layer in layers:
        module = tiny.model.get_submodule(layer)
        module.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    tiny.predict()
    assert list(dict.fromkeys(ran)) == layers
