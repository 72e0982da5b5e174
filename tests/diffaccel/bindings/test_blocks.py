"""Every bound denoiser class: a block that is left out hands on what the block would."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS

from diffaccel.bindings import binding_of
from diffaccel.guidance.perturb.blocks import pass_through

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert len(checked) == len(blocks)


@pytest.mark.parametrize("name", MODELS)
def test_stages_split_by_samples(name):
    """What a stage returns for some samples are those rows of what it returns for all."""
    tiny = MODELS[name]()
    stages = binding_of(tiny.model).stages(tiny.model)
    batches = []

    def note(module, args, output):
        parts = output if isinstance(output, tuple) else (output,)
        batches.extend(len(part) for part in parts if isinstance(part, torch.Tensor))

    handles = [tiny.model.get_submodule(stage).register_forward_hook(note) for stage in stages]
    prediction = tiny.predict()
    for handle in handles:
        handle.remove()
    assert set(batches) <= {len(prediction)}
