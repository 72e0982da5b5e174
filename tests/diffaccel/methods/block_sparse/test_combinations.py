"""What holds for every selector with every corrector and every budget."""

from dataclasses import fields, replace

import pytest
import torch
from block_calls import all_rows, block_call, smooth_tokens, statistics_of

from diffaccel.kernels import dense_attention
from diffaccel.layout import Segment, TokenLayout
from diffaccel.methods import SparseAttn
from diffaccel.methods.block_sparse import estimator
from diffaccel.methods.block_sparse.block_call import BlockCall
from diffaccel.methods.block_sparse.budgets import (
    BUDGETS,
    MassBudget,
    MixedBudget,
    PositiveBudget,
    RowBudget,
)
from diffaccel.methods.block_sparse.correctors import CORRECTORS
from diffaccel.methods.block_sparse.order import in_order, token_order
from diffaccel.methods.block_sparse.plan import blocks_of, planned
from diffaccel.methods.block_sparse.selectors import (
    SELECTORS,
    FlexPrefill,
    HashedBuckets,
    OwnBlocks,
    ProxyDeviations,
    RadialWindows,
    SelfSimilarity,
    SlidingTiles,
    SpatialTemporal,
    SubBlocks,
    TreeSearch,
    VideoBlockGate,
)
from diffaccel.methods.inputs import AttentionInputs, Position

BLOCK = 16
LAYOUT = TokenLayout.video(5, 6, 7, text_before=5, text_after=4)  # 14 blocks, the last of 2
NUMBER = 14


def own_scores(rows):
    return rows.probability[..., :-1]


VARIANTS = {
    # sizes that leave something out of so few tokens
    "tree": TreeSearch(48, sink=16, window=32),
    "hash": HashedBuckets(bucket=32),
    "radial": RadialWindows(decay=0.02, sink=False),
    "tiles": SlidingTiles((1, 4, 4)),
    "flexprefill": FlexPrefill(0.5, rows=24, least=16),
    "self-similarity": SelfSimilarity(0.3, smooth_keys=False),
    "spatial-temporal": SpatialTemporal(rows=16),
    # and knobs that change what is computed
    "tau-ranked": ProxyDeviations(None),
    "vmoba-row": VideoBlockGate("row"),
    "vmoba-overall": VideoBlockGate("overall"),
    "vmoba-count": VideoBlockGate("head", None),
    "sub-blocks-max": SubBlocks(2, 8, "max"),
    "own-mask": OwnBlocks((torch.arange(NUMBER)[:, None] - torch.arange(NUMBER)).abs() % 5 < 2),
    "own-function": OwnBlocks(own_scores),
}
ALL = {name: VARIANTS.get(name) or SELECTORS[name]() for name in [*SELECTORS, *VARIANTS]}
MEANS = ["expected-error", "pooled", "visual", "tau", "tau-ranked", "moba", "vmoba", "vmoba-row"]
MEANS += ["regions", "self-similarity", "power", "radial", "tiles", "own-mask", "own-function"]
UNKNOWN = {"sub-blocks", "sub-blocks-max", "tree", "hash", "flexprefill", "spatial-temporal"}

selectors = pytest.mark.parametrize("name", ALL)


def method(name, corrector="none", **knobs):
    return SparseAttn(0.25, selector=ALL[name], corrector=corrector, block=BLOCK, **knobs)


def kept(name, tokens, budget=None, keep=0.25, layout=LAYOUT, mask=None):
    """Which visual blocks a selector keeps: (B, H, NB, NB) bool, after checks of the lists."""
    configured = SparseAttn(
        keep, selector=ALL[name], corrector="none", budget=budget, block=BLOCK, order="brick"
    )
    inputs = AttentionInputs.checked(*tokens, layout, None, mask)
    blocks = blocks_of(configured, layout, torch.device("cpu"), "brick")
    visual = in_order(inputs.visual(), blocks.order)
    chosen = planned(configured, visual, inputs.exact(), Position()).chosen
    indices, counts, number = chosen.indices, chosen.counts, blocks.number
    assert indices.dtype == counts.dtype == torch.int32
    assert (counts >= 0).all() and (counts <= indices.shape[-1]).all()
    is_listed = torch.arange(indices.shape[-1]) < counts[..., None]
    assert ((indices >= 0) & (indices < number))[is_listed].all()
    is_pair = is_listed[..., 1:]
    assert (indices[..., 1:] > indices[..., :-1])[is_pair].all()
    found = chosen.kept(slice(0, number))
    if blocks.forced.mask is not None and mask is None:
        assert found[..., blocks.forced.mask].all()
    return found


def test_all_selectors_are_tested():
    assert set(ALL) >= set(SELECTORS)


@pytest.mark.parametrize("corrector", CORRECTORS)
@selectors
def test_constant_values_stay_constant_whatever_the_corrector(name, corrector):
    query, key, value = smooth_tokens(LAYOUT, noise=0.2, heads=1)
    constant = value[:, :1].expand_as(value)
    configured = method(name, corrector, order="brick")
    assert configured.shape_reason(LAYOUT) == ""
    output, density = configured.attend_with_density(query, key, constant, LAYOUT)
    torch.testing.assert_close(output, constant, atol=1e-4, rtol=1e-4)
    assert 0.1 < float(density) < 1.0


@pytest.mark.parametrize("corrector", ["none", "pooled", "tail", "value"])
@selectors
def test_all_blocks_through_the_sparse_kernel_equal_dense(name, corrector):
    tokens = smooth_tokens(LAYOUT, noise=0.2, heads=1)
    configured = method(name, corrector, order="raster", p_remain=1.0)
    assert configured.shape_reason(LAYOUT) == ""
    output, density = configured.attend_with_density(*tokens, LAYOUT)
    assert float(density) > 0.99
    torch.testing.assert_close(output, dense_attention(*tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", BUDGETS)
@selectors
def test_every_budget_takes_every_selector(name, budget):
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    found = kept(name, tokens, BUDGETS[budget])
    assert found.any(-1).float().mean() > 0.5
    output = method(name, "means", budget=budget).attend(*tokens, LAYOUT)
    error = (output - dense_attention(*tokens)).norm() / output.norm()
    assert output.isfinite().all() and error < 0.9


@selectors
def test_a_row_budget_is_met_exactly_where_a_selector_scores_enough_blocks(name):
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    selector = ALL[name]
    found = kept(name, tokens, RowBudget())
    forced = selector.forced(token_order(LAYOUT.grid, "brick", BLOCK))
    if not selector.decides:
        extra = 0 if forced is None else forced.sum(-1)
        assert (found.sum(-1) <= 3 + extra).all()
    ranks_all = name in MEANS[:2] + ["visual", "tau-ranked", "moba", "regions", "hash"]
    if ranks_all or name.startswith("sub-blocks"):
        assert (found.sum(-1) >= 3).all()


@selectors
def test_a_larger_budget_keeps_a_superset(name):
    tokens = smooth_tokens(LAYOUT, noise=0.2, batch=2)
    for smaller, larger in (
        ((RowBudget(), 0.2), (RowBudget(), 0.5)),
        ((MixedBudget(0.0), 0.2), (MixedBudget(0.0), 0.5)),
        ((MassBudget(0.3), 1.0), (MassBudget(0.7), 1.0)),
        ((MassBudget(0.3, True), 1.0), (MassBudget(0.7, True), 1.0)),
    ):
        few, many = (kept(name, tokens, *budget) for budget in (smaller, larger))
        assert not (few & ~many).any()


def test_a_lower_tau_keeps_a_superset():
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    few, many = (
        SparseAttn(selector=ProxyDeviations(tau), corrector="none", block=16).attend_with_density(
            *tokens, LAYOUT
        )[1]
        for tau in (1.5, 0.5)
    )
    assert few < many


@selectors
def test_padding_equals_single_runs_whatever_the_padded_tokens_hold(name):
    layout = TokenLayout.video(5, 6, 7, text_after=10)
    query, key, value = smooth_tokens(layout, batch=3, noise=0.2)
    mask = torch.ones(3, layout.length, dtype=torch.bool)
    mask[0, 213:] = False  # text
    mask[1, 90:150] = False  # visual, some blocks completely in raster order
    query, key, value = (
        x.masked_fill(~mask[..., None, None], torch.nan) for x in (query, key, value)
    )
    for corrector in ("none", "sampled"):
        configured = method(name, corrector, order="raster")
        output = configured.attend(query, key, value, layout, key_padding_mask=mask)
        for sample in range(3):
            one = slice(sample, sample + 1)
            alone = (x[one] for x in (query, key, value))
            single = configured.attend(*alone, layout, key_padding_mask=mask[one])
            real = mask[sample]
            assert output[sample, real].isfinite().all()
            torch.testing.assert_close(output[sample, real], single[0, real], atol=1e-5, rtol=1e-5)


@selectors
def test_a_sample_without_any_valid_key_stays_finite(name):
    layout = TokenLayout.video(5, 6, 7)
    tokens = smooth_tokens(layout, batch=2)
    mask = torch.ones(2, layout.length, dtype=torch.bool)
    mask[1] = False
    output = method(name, "means").attend(*tokens, layout, key_padding_mask=mask)
    assert output[0].isfinite().all() and (output[1] == 0).all()


@selectors
def test_heads_are_independent_unless_a_selector_says_otherwise(name):
    query, key, value = smooth_tokens(LAYOUT, heads=3, noise=0.2)
    configured = method(name, order="brick")
    output = configured.attend(query, key, value, LAYOUT)
    if not configured.compares_heads:
        alone = configured.attend(query[:, :, 1:2], key[:, :, 1:2], value[:, :, 1:2], LAYOUT)
        torch.testing.assert_close(alone, output[:, :, 1:2], atol=1e-5, rtol=1e-5)
    turn = [2, 0, 1]
    turned = configured.attend(query[:, :, turn], key[:, :, turn], value[:, :, turn], LAYOUT)
    torch.testing.assert_close(turned, output[:, :, turn], atol=1e-5, rtol=1e-5)


def test_selectors_that_compare_heads_say_so():
    comparing = {name for name in ALL if method(name).compares_heads}
    assert comparing == {"regions", "vmoba-overall", "own-function"}


@pytest.mark.parametrize("name", MEANS)
def test_permuting_tokens_within_blocks_leaves_scores_of_means_unchanged(name):
    call = block_call(0.7, tokens=NUMBER * BLOCK)
    inside = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(1))
    moved = torch.arange(NUMBER * BLOCK).view(-1, BLOCK)[:, inside].flatten()
    visual = call.visual
    scores = [ALL[name].score(all_rows(call))]
    for x in (visual.query, visual.key, visual.value):
        x.copy_(x[:, moved])
    again = BlockCall(visual, call.exact, call.order, statistics_of(visual, BLOCK), call.position)
    scores.append(ALL[name].score(all_rows(again)))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@selectors
def test_low_precision_chooses_what_fp32_chooses(name, dtype):
    tokens = [x.to(dtype) for x in smooth_tokens(LAYOUT, noise=0.2)]
    low = kept(name, tokens)
    high = kept(name, [x.float() for x in tokens])
    assert (low != high).float().mean() < 0.002  # a tie within rounding
    output = method(name).attend(*tokens, LAYOUT)
    assert output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@selectors
def test_keys_that_are_not_finite_stay_visible(name, value):
    query, key, values = smooth_tokens(LAYOUT, noise=0.2)
    key[0, 100, 1, 3] = value
    output = method(name).attend(query, key, values, LAYOUT)[:, LAYOUT.visual_slice]
    assert not output[0, :, 1].isfinite().all()
    if not method(name).compares_heads:
        assert output[0, :, 0].isfinite().all()


@selectors
def test_two_runs_are_bit_equal_and_the_inputs_stay_untouched(name):
    tokens = smooth_tokens(LAYOUT)
    copies = [x.clone() for x in tokens]
    with torch.inference_mode():
        first = method(name, "output").attend(*tokens, LAYOUT)
    assert torch.equal(first, method(name, "output").attend(*tokens, LAYOUT))
    assert all(map(torch.equal, tokens, copies))


@selectors
def test_sequences_without_visual_tokens_or_of_one_block_are_dense(name):
    if name == "own-mask":
        return  # it is a mask of fourteen blocks
    for layout in (TokenLayout.image(3, 4, text_after=5), TokenLayout.image(1, 1)):
        tokens = smooth_tokens(layout)
        output = method(name).attend(*tokens, layout)
        torch.testing.assert_close(output, dense_attention(*tokens), atol=1e-5, rtol=1e-5)
    text = TokenLayout((Segment("text", 7),))
    tokens = smooth_tokens(text)
    assert torch.equal(method(name).attend(*tokens, text), dense_attention(*tokens))


@selectors
def test_rows_in_several_steps_keep_what_one_step_keeps(name, monkeypatch):
    """Memory bounds how many query blocks are scored at a time, and not the result."""
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    if method(name).parts().budget.looks_at_all_rows:
        return  # a threshold is then found on a part of the rows
    whole = kept(name, tokens)
    monkeypatch.setattr(estimator, "_STEP_ELEMENTS", 5 * 2 * (NUMBER + 10))
    assert torch.equal(kept(name, tokens), whole)


@pytest.mark.parametrize("name", ["power", "radial", "tiles", "spatial-temporal", "own-mask"])
@pytest.mark.parametrize("order", ["raster", "brick", "cyclic"])
def test_a_pattern_foretells_its_density(name, order):
    tokens = smooth_tokens(LAYOUT)
    configured = method(name, order=order)
    assert isinstance(configured.parts().budget, PositiveBudget)
    expected = configured.expected_density(LAYOUT)
    each = [
        float(configured.attend_with_density(*tokens, LAYOUT, layer=layer)[1])
        for layer in range(3)
    ]
    assert sum(each) / 3 == pytest.approx(expected, abs=1e-5)


def test_a_cyclic_order_cuts_each_layer_in_its_own_way():
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    cyclic = method("pooled", order="cyclic")
    for layer in range(6):
        fixed = method("pooled", order=("raster", "columns", "brick")[layer % 3])
        assert torch.equal(
            cyclic.attend(*tokens, LAYOUT, layer=layer), fixed.attend(*tokens, LAYOUT)
        )


PARTS = (
    *(selector() for selector in SELECTORS.values()),
    *CORRECTORS.values(),
    *BUDGETS.values(),
)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("wrong", [float("nan"), "no"])
def test_no_number_of_a_part_takes_anything(part, wrong):
    for field in fields(part):
        if "float" in str(field.type):
            with pytest.raises(ValueError, match=field.name):
                replace(part, **{field.name: wrong})
