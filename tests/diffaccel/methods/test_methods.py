"""Doors, schedules and published settings of the methods."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffaccel.layout import Segment, TokenLayout
from diffaccel.methods import FullAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.inputs import Position
from diffaccel.methods.published import PUBLISHED

SPARSE = (SparseAttn, RectifiedSpaAttn)


def random_tokens(layout, batch=1, heads=2, channels=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.length, heads, channels)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


def sdpa(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_is_sdpa_bit_for_bit(dtype):
    layout = TokenLayout.image(9, 7, text_before=5)
    tokens = random_tokens(layout, batch=3, dtype=dtype)
    output, density = FullAttn().attend_with_density(*tokens, layout)
    assert torch.equal(output, sdpa(*tokens))
    assert density == 1.0


@pytest.mark.parametrize(
    "method",
    [FullAttn(), SparseAttn(0.1, order="brick"), RectifiedSpaAttn(0.9, dense_layers=(0, 3))],
    ids=repr,
)
def test_a_method_is_its_configuration(method):
    names = {cls.__name__: cls for cls in (*SPARSE, FullAttn)}
    assert eval(repr(method), names) == method
    assert hash(method) == hash(dataclasses.replace(method))
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        method.drop = 0.5
    assert not hasattr(method, "__dict__")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: RectifiedSpaAttn(drop=1.0), "drop must be at least 0 and below 1, got drop=1.0"),
        (lambda: RectifiedSpaAttn(drop=-0.1), "drop"),
        (lambda: SparseAttn(keep=0.0), "keep must lie above 0"),
        (lambda: SparseAttn(keep=1.5), "keep"),
        (lambda: SparseAttn(p_remain=1.5), "p_remain must lie in 0 to 1"),
        (lambda: RectifiedSpaAttn(block=100), "block must be a power of two"),
        (lambda: RectifiedSpaAttn(block=8), "block"),
        (lambda: RectifiedSpaAttn(order="zigzag"), "got order='zigzag'"),
        (lambda: RectifiedSpaAttn(first_frame="yes"), "first_frame"),
        (lambda: RectifiedSpaAttn(dense_steps=-1), "dense_steps"),
        (lambda: RectifiedSpaAttn(dense_layers=(1, -2)), "dense_layers"),
    ],
)
def test_construction_refuses_values_out_of_range(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_attend_refuses_tensors_that_do_not_fit():
    layout = TokenLayout.image(4, 6)
    query, key, value = random_tokens(layout)
    method = FullAttn()
    with pytest.raises(ValueError, match="a layout of 20 tokens for N=24"):
        method.attend(query, key, value, TokenLayout.image(4, 5))
    with pytest.raises(TypeError, match="layout must be a TokenLayout, got tuple"):
        method.attend(query, key, value, (4, 6))
    with pytest.raises(ValueError, match="one shape"):
        method.attend(query, key[:, :5], value, layout)
    with pytest.raises(ValueError, match="one shape"):
        method.attend(query[0], key[0], value[0], layout)
    with pytest.raises(TypeError, match="one floating-point dtype"):
        method.attend(query, key.half(), value, layout)
    with pytest.raises(ValueError, match="scale must be positive"):
        method.attend(query, key, value, layout, scale=0.0)
    with pytest.raises(TypeError, match="must be bool"):
        method.attend(query, key, value, layout, key_padding_mask=torch.ones(1, 24))
    with pytest.raises(ValueError, match=r"\(B, N\) = \(1, 24\)"):
        method.attend(
            query, key, value, layout, key_padding_mask=torch.ones(1, 23, dtype=torch.bool)
        )


@pytest.mark.parametrize("method", SPARSE)
def test_schedule_decides_which_calls_run_dense(method):
    layout = TokenLayout.image(12, 20, text_before=4)
    tokens = random_tokens(layout)
    knobs = {"block": 16, "dense_steps": 2, "dense_layers": (1, 5)}
    configured = method(**knobs)

    def is_dense(**at):
        output, density = configured.attend_with_density(*tokens, layout, **at)
        dense = torch.equal(output, sdpa(*tokens))
        assert dense == (float(density) == 1.0)
        return dense

    assert is_dense(layer=0, step=1) and is_dense(layer=5, step=2) and is_dense(step=0)
    assert not is_dense(layer=0, step=2) and not is_dense() and not is_dense(layer=2)


def test_an_integer_means_the_first_layers():
    method = SparseAttn(dense_layers=2)
    assert [bool(method.schedule_reason(Position(layer, 9))) for layer in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert SparseAttn().schedule_reason(Position(0, 0)) == ""


def test_resolved_fills_only_what_is_unset():
    wan = RectifiedSpaAttn().resolved("wan2.1-t2v", 30)
    assert (wan.dense_steps, wan.dense_layers, wan.first_frame) == (5, 2, True)
    assert wan.drop == 0.8
    kept = RectifiedSpaAttn(dense_steps=0, first_frame=False).resolved("wan2.1-t2v", 30)
    assert (kept.dense_steps, kept.dense_layers, kept.first_frame) == (0, 2, False)
    assert SparseAttn().resolved("hunyuan", 60) == SparseAttn(
        dense_steps=0, dense_layers=0, first_frame=False
    )
    assert FullAttn().resolved("flux", 57) == FullAttn()


def test_last_layers_of_flux_are_dense_in_the_published_depth_only():
    assert RectifiedSpaAttn().resolved("flux", 57).dense_layers == tuple(range(37, 57))
    assert RectifiedSpaAttn().resolved("flux", 12).dense_layers == 0


def test_the_two_experts_of_wan_have_their_own_dense_steps():
    steps = [RectifiedSpaAttn().resolved("wan2.2-t2v", 40, expert=n).dense_steps for n in (0, 1)]
    assert steps == [3, 1]


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_every_family_resolves_completely(family):
    method = RectifiedSpaAttn.published(family).resolved(family, 24)
    assert None not in (method.dense_steps, method.dense_layers, method.first_frame)
    assert method.drop == (PUBLISHED[family].drop or 0.8)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="family must be one of .*cogvideox, .*got family='sora'"):
        RectifiedSpaAttn.published("sora")


def test_text_alone_runs_dense():
    layout = TokenLayout((Segment("text", 40),))
    tokens = random_tokens(layout)
    for method in SPARSE:
        output, density = method(block=16).attend_with_density(*tokens, layout)
        assert torch.equal(output, sdpa(*tokens)) and density == 1.0
