"""What block-sparse methods remember of a layer: its order, its block lists, what was fitted."""

import copy
from dataclasses import replace

import pytest
import torch

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods import ProportionalAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.block_sparse.budgets import Scores
from diffaccel.methods.block_sparse.reuse import has_drifted, steadied
from diffaccel.methods.inputs import AttentionInputs, Position
from diffaccel.methods.memory import LayerMemory
from tests.diffaccel.methods.block_sparse.test_base import smooth_tokens

LAYOUT = TokenLayout.image(16, 24, text_before=5)
RAGGED = TokenLayout.video(3, 5, 11, text_before=5, text_after=4)
KNOBS = {"block": 16, "order": "raster"}
CORRECTORS = ("none", "pooled", "tail", "variance", "normaliser", "output", "value")


class Layer:
    """A layer in a run: calls of a method that share a memory."""

    def __init__(self, method, layout=LAYOUT):
        self.method, self.layout = method, layout
        self.memory = LayerMemory()

    def __call__(self, step, tokens, mask=None, layout=None, progress=None):
        inputs = AttentionInputs.checked(*tokens, layout or self.layout, None, mask)
        position = Position(0, step, progress, None, self.memory)
        return self.method.run(inputs, position).output

    @property
    def reused(self):
        return self.memory.reused_calls


def tokens_of(seed=0, layout=LAYOUT, **options):
    return smooth_tokens(layout, seed=seed, **options)


def nearby(tokens, share=0.02):
    """The same tokens a step later."""
    generator = torch.Generator().manual_seed(9)
    return tuple(x + share * torch.randn(x.shape, generator=generator).to(x.dtype) for x in tokens)


def alike(layout, patch):
    """Tokens that are nearly alike within patches (height, width) of the grid."""
    generator = torch.Generator().manual_seed(0)
    _, height, width = layout.grid
    made = []
    for x in tokens_of(layout=layout):
        shape = 1, height // patch[0], width // patch[1], *x.shape[2:]
        field = 2.0 * torch.randn(shape, generator=generator)
        field = field.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2).flatten(1, 2)
        x[:, layout.visual_slice] = field + 0.05 * torch.randn(field.shape, generator=generator)
        made.append(x)
    return tuple(made)


SQUARE = TokenLayout.image(16, 16, text_before=5)
SUITED = {"raster": (1, 16), "brick": (4, 4)}


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corrector", ["none", "output"])
def test_the_order_with_less_error_is_taken(corrector, dtype, mask):
    layout, padded = SQUARE, None
    if mask:
        padded = torch.ones(1, layout.length, dtype=torch.bool)
        padded[:, -9:] = False
    for name, patch in SUITED.items():
        tokens = tuple(x.to(dtype) for x in alike(layout, patch))
        if mask:
            tokens[0][:, -9:], tokens[2][:, -9:] = torch.nan, torch.nan
        method = SparseAttn(0.2, corrector=corrector, block=16, order="auto")
        layer = Layer(method, layout)
        output = layer(0, tokens, padded)
        fixed = {
            order: SparseAttn(0.2, corrector=corrector, block=16, order=order).attend(
                *tokens, layout, key_padding_mask=padded
            )
            for order in ("raster", "brick")
        }
        real = slice(None) if padded is None else padded[0]
        exact = dense_attention(*tokens, key_padding_mask=padded)[:, real].float()
        errors = {k: (v[:, real].float() - exact).norm() for k, v in fixed.items()}
        assert min(errors, key=errors.get) == name
        assert list(layer.memory.orders.values()) == [name]
        assert torch.equal(output[:, real], fixed[name][:, real])


def test_an_order_once_taken_stays_for_the_run():
    method = SparseAttn(0.2, block=16, order="auto")
    layer, others = Layer(method, SQUARE), alike(SQUARE, SUITED["brick"])
    layer(0, alike(SQUARE, SUITED["raster"]))
    raster = SparseAttn(0.2, **KNOBS)
    assert torch.equal(layer(1, others), raster.attend(*others, SQUARE))
    brick = SparseAttn(0.2, block=16, order="brick")
    assert torch.equal(Layer(method, SQUARE)(1, others), brick.attend(*others, SQUARE))


def test_noise_is_not_asked_for_its_order():
    """Early in the schedule the order is raster; lists in it serve none of another order."""
    tokens, brick = alike(SQUARE, SUITED["brick"]), SparseAttn(0.2, block=16, order="brick")
    raster = SparseAttn(0.2, **KNOBS)
    layer = Layer(SparseAttn(0.2, block=16, order="auto", reuse=3, hysteresis=0.5), SQUARE)
    for step, progress, order in (
        (0, 0.0, raster), (0, 0.0, raster), (1, 0.19, raster), (1, 0.19, raster),
        (2, 0.2, brick), (2, 0.2, brick), (3, 0.1, brick),
    ):  # fmt: skip
        output, expected = layer(step, tokens, progress=progress), order.attend(*tokens, SQUARE)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert layer.reused == 3 and list(layer.memory.orders.values()) == ["brick"]


def test_without_memory_the_order_is_raster():
    tokens = tokens_of()
    for method in (SparseAttn(0.3, block=16), RectifiedSpaAttn(0.7, block=16, first_frame=True)):
        auto, raster = (replace(method, order=order) for order in ("auto", "raster"))
        assert torch.equal(auto.attend(*tokens, LAYOUT), raster.attend(*tokens, LAYOUT))
        assert auto.expected_density(LAYOUT) == raster.expected_density(LAYOUT)
        assert auto.shape_reason(LAYOUT) == raster.shape_reason(LAYOUT)


def test_orders_that_are_the_same_are_not_compared():
    """A grid of one row has one order: nothing is computed twice, or chosen by rounding."""
    layout = TokenLayout.image(1, 200)
    layer = Layer(SparseAttn(0.3, block=16, order="auto"), layout)
    tokens = tokens_of(layout=layout)
    output = layer(0, tokens)
    assert list(layer.memory.orders.values()) == ["raster"]
    assert torch.equal(output, SparseAttn(0.3, **KNOBS).attend(*tokens, layout))


@pytest.mark.parametrize("layout", [LAYOUT, RAGGED], ids=["image", "ragged video"])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_equal_tokens_give_the_same_output_with_reused_lists(corrector, layout):
    method = SparseAttn(0.3, corrector=corrector, reuse=2, **KNOBS)
    layer, tokens = Layer(method, layout), tokens_of(layout=layout)
    fresh = SparseAttn(0.3, corrector=corrector, **KNOBS).attend(*tokens, layout)
    assert torch.equal(layer(0, tokens), fresh) and layer.reused == 0
    torch.testing.assert_close(layer(1, tokens), fresh, rtol=1e-6, atol=1e-6)
    assert layer.reused == 1


@pytest.mark.parametrize("corrector", ["none", "value"])
def test_lists_are_those_of_the_earlier_step(corrector):
    """A token that attention turns to later is not seen by rows that left its block out."""
    method = SparseAttn(0.3, selector="pooled", corrector=corrector, reuse=1, **KNOBS)
    layer, tokens = Layer(method), tokens_of()
    layer(0, tokens)
    (remembered,) = layer.memory._remembered.values()
    kept = remembered["selection"].kept
    later = nearby(tokens)
    layer(1, later)
    assert layer.reused == 1 and remembered["selection"].kept is kept
    fresh = Layer(method)
    fresh(1, later)
    (anew,) = fresh.memory._remembered.values()
    assert not anew["selection"].kept.equal(kept)


def test_lists_serve_so_many_steps_and_no_more():
    tokens = tokens_of()
    for reuse, expected in ((0, 0), (1, 3), (2, 4), (9, 5)):
        layer = Layer(SparseAttn(0.3, reuse=reuse, **KNOBS))
        for step in range(6):
            layer(step, tokens)
        assert layer.reused == expected
    skipping = Layer(SparseAttn(0.3, reuse=2, **KNOBS))
    for step in (0, 2, 5):  # a cache answers for the steps between
        skipping(step, tokens)
    assert skipping.reused == 1


def test_lists_that_no_longer_hold_what_matters_are_made_anew():
    method = SparseAttn(0.3, reuse=5, **KNOBS)
    layer, other = Layer(method), tokens_of(seed=7)
    layer(0, tokens_of())
    assert torch.equal(layer(1, other), Layer(method)(1, other)) and layer.reused == 0
    layer(2, other)
    assert layer.reused == 1


def test_drift_is_what_the_lists_miss_of_the_score():
    blocks = torch.tensor([[[[5.0, 3.0, 1.0, 1.0]]]])
    for kept, drifted in (
        ([1, 1, 0, 0], False), ([1, 0, 1, 0], True), ([0, 0, 1, 1], True), ([0, 0, 0, 0], False),
        ([1, 1, 1, 1], False),
    ):  # fmt: skip
        assert has_drifted(Scores(blocks), torch.tensor([[[kept]]]).bool()) is drifted
    always = torch.tensor([[True, False, False, False]])
    for kept, drifted in (([1, 0, 1, 0], True), ([1, 1, 0, 0], False), ([0, 1, 1, 0], True)):
        scores = Scores(blocks, always=always)  # what is kept anyway is no merit
        assert has_drifted(scores, torch.tensor([[[kept]]]).bool()) is drifted
    broken = torch.tensor([[[[torch.nan, 3.0, 1.0, 1.0]]]])
    assert has_drifted(Scores(broken), torch.tensor([[[[True, True, False, False]]]]))


def test_calls_of_another_kind_share_nothing():
    method = SparseAttn(0.3, reuse=5, **KNOBS)
    one, two = tokens_of(), tokens_of(batch=2)
    layer = Layer(method)
    layer(0, one)
    for tokens, layout in (
        (two, LAYOUT), (tuple(x.double() for x in one), LAYOUT),
        (one, TokenLayout.image(24, 16, text_before=5)),
        (one, TokenLayout.image(16, 24, text_after=5)),
    ):  # fmt: skip
        output = layer(1, tokens, layout=layout)
        assert torch.equal(output, method.attend(*tokens, layout))
    assert layer.reused == 0


def test_passes_of_guidance_have_lists_of_their_own():
    method = SparseAttn(0.3, reuse=3, hysteresis=0.5, order="auto", block=16)
    passes = tokens_of(seed=1), tokens_of(seed=2)
    both, alone = Layer(method), [Layer(method), Layer(method)]
    alone[1].memory.orders = both.memory.orders  # of the layer, not of the pass
    for step in range(3):
        for layer, tokens in zip(alone, passes, strict=True):
            later = nearby(tokens, 0.01 * step)
            assert torch.equal(both(step, later), layer(step, later))
    assert both.reused == alone[0].reused + alone[1].reused == 4


def test_a_second_pass_of_guidance_can_take_the_lists_of_the_first():
    knobs = {"selector": "pooled", "corrector": "value", **KNOBS}
    first, second = tokens_of(), nearby(tokens_of(), 0.1)
    layer = Layer(SparseAttn(0.3, reuse_passes=True, **knobs))
    alone = SparseAttn(0.3, **knobs)
    for step in range(3):
        assert torch.equal(layer(step, first), alone.attend(*first, LAYOUT))
        shared = layer(step, second)
        assert layer.reused == step + 1  # the first pass selects anew in each step
    later = Layer(SparseAttn(0.3, reuse=1, **knobs))
    later(0, first)
    assert torch.equal(later(1, second), shared)
    assert not torch.equal(alone.attend(*second, LAYOUT), shared)
    layer(3, first)
    other = tokens_of(seed=7)
    assert torch.equal(layer(3, other), alone.attend(*other, LAYOUT)) and layer.reused == 3


def test_both_passes_take_lists_of_an_earlier_step_where_both_may():
    layer = Layer(SparseAttn(0.3, reuse=1, reuse_passes=True, **KNOBS))
    for step in range(4):
        layer(step, tokens_of())
        layer(step, nearby(tokens_of()))
    assert layer.reused == 2 + 4  # all but the first pass of steps 0 and 2


def test_samples_of_a_batch_have_lists_of_their_own():
    method = SparseAttn(0.3, reuse=3, **KNOBS)
    both, batch = Layer(method), tokens_of(batch=2)
    both(0, batch)
    for sample in range(2):
        one = Layer(method)
        single = tuple(x[sample : sample + 1] for x in batch)
        one(0, single)
        later = nearby(batch)
        expected = one(1, tuple(x[sample : sample + 1] for x in later))
        copied = copy.copy(both.memory.__dict__)
        got = both(1, later)
        torch.testing.assert_close(got[sample : sample + 1], expected, rtol=1e-5, atol=1e-5)
        both.memory.__dict__.update(copied)


def test_what_wraps_a_method_hands_its_memory_on():
    inner = SparseAttn(0.3, reuse=1, order="auto", block=16)
    layer, tokens = Layer(ProportionalAttn(inner, train_tokens=100)), tokens_of()
    first = layer(0, tokens)
    assert len(layer.memory.orders) == 1
    torch.testing.assert_close(layer(1, tokens), first, rtol=1e-6, atol=1e-6)
    assert layer.reused == 1


def test_a_copy_remembers_nothing():
    layer = Layer(SparseAttn(0.3, reuse=1, order="auto", block=16))
    layer(0, tokens_of())
    copied = copy.deepcopy(layer.memory)
    assert not copied.orders and not copied._remembered


def test_hysteresis_keeps_what_was_kept():
    """A little noise moves choices near the border; much hysteresis moves none."""
    moved = {}
    for hysteresis in (1e-9, 0.2, 1e6):
        method = SparseAttn(
            0.3, selector="pooled", corrector="none", hysteresis=hysteresis, **KNOBS
        )
        layer, kept = Layer(method), []
        for step, tokens in enumerate((tokens_of(), nearby(tokens_of(), 0.5))):
            layer(step, tokens)
            (remembered,) = layer.memory._remembered.values()
            kept.append(remembered["selection"].kept)
        assert kept[0].sum() == kept[1].sum()
        moved[hysteresis] = int((kept[0] ^ kept[1]).sum())
    assert moved[1e-9] > moved[0.2] > moved[1e6] == 0


def test_steadied_scores_are_still_shares_of_the_mass():
    scores = torch.rand(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    earlier = scores > 0.6
    mass = Scores(scores / 8, torch.full((1, 2, 5), 0.1))
    steady = steadied(mass, earlier, 0.5)
    torch.testing.assert_close(steady.blocks.sum(-1), mass.blocks.sum(-1))
    ratio = steady.blocks / mass.blocks
    torch.testing.assert_close(
        ratio.masked_fill(~earlier, 0.0).amax(-1),
        1.5 * ratio.masked_fill(earlier, 0.0).amax(-1) * earlier.any(-1),
    )
    plain = steadied(Scores(scores), earlier, 0.5).blocks
    assert torch.equal(plain, torch.where(earlier, scores * 1.5, scores))
    zero = steadied(
        Scores(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1)), earlier[:, :1, :1, :4], 1
    )
    assert torch.equal(zero.blocks, torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"reuse": -1}, "reuse"),
        ({"reuse": 0.5}, "reuse"),
        ({"hysteresis": -0.1}, "hysteresis"),
        ({"hysteresis": float("inf")}, "hysteresis"),
        ({"reuse": 1, "max_error": 0.05}, "reuse and hysteresis"),
        ({"reuse_passes": True, "max_error": 0.05}, "reuse_passes False"),
        ({"reuse_passes": 2}, "reuse_passes"),
        ({"order": "spiral"}, "auto, .*, hilbert, brick, raster, got"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        SparseAttn(**knobs)
