"""ProportionalAttn: another method with sharpened scores."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from diffaccel import FullAttn, NeighborhoodAttn, ProportionalAttn, SparseAttn, TokenLayout
from diffaccel.kernels import dense_attention

LAYOUT = TokenLayout.image(12, 20, text_before=8)


def drawn():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, LAYOUT.length, 2, 24, generator=generator) for _ in range(3)]


def test_scores_are_multiplied_by_the_ratio_of_logarithms():
    tokens = drawn()
    factor = sqrt(log(248) / log(100))
    output = ProportionalAttn(train_tokens=100).attend(*tokens, LAYOUT)
    assert torch.equal(output, dense_attention(*tokens, scale=24**-0.5 * factor))
    published = TokenLayout.image(256, 256, text_before=512)
    flux = ProportionalAttn(train_tokens=4608).temperature(published)
    assert flux == pytest.approx(sqrt(log(66048) / log(4608)))


@pytest.mark.parametrize(
    "method", [FullAttn(), NeighborhoodAttn(5), SparseAttn(keep=0.5, block=16)], ids=repr
)
def test_at_training_length_it_is_the_method(method):
    tokens = drawn()
    layout = replace(LAYOUT, native=(1, 12, 20))
    expected = method.attend(*tokens, layout)
    assert torch.equal(ProportionalAttn(method).attend(*tokens, layout), expected)


def test_the_inner_schedule_runs_dense_with_sharpened_scores():
    tokens = drawn()
    method = ProportionalAttn(NeighborhoodAttn(5, dense_steps=1), train_tokens=100)
    scale = 24**-0.5 * method.temperature(LAYOUT)
    expected = dense_attention(*tokens, scale=scale)
    assert torch.equal(method.attend(*tokens, LAYOUT, step=0), expected)
    assert not torch.equal(method.attend(*tokens, LAYOUT, step=1), expected)


def test_the_schedule_of_a_family_reaches_the_inner_method():
    method = ProportionalAttn(SparseAttn()).resolved("wan2.1-t2v", 30)
    assert method.method == SparseAttn().resolved("wan2.1-t2v", 30)


def test_bad_values_are_refused():
    with pytest.raises(TypeError, match="another attention method"):
        ProportionalAttn("full")
    with pytest.raises(ValueError, match="train_tokens must be"):
        ProportionalAttn(train_tokens=1)
    with pytest.raises(ValueError, match="pass train_tokens"):
        ProportionalAttn().attend(*drawn(), LAYOUT)
