"""How many blocks are kept, and how they are shared out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.methods.block_sparse.budgets import (
    Ask,
    MassBudget,
    MixedBudget,
    PositiveBudget,
    RowBudget,
    Scores,
)


def probabilities(rows, blocks, text=0.0, seed=0, batch=1, heads=2):
    """Scores of mass, and that of the text."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(batch, heads, rows, blocks, generator=generator)
    visual = raw / raw.sum(-1, keepdim=True) * (1 - text)
    return Scores(visual, torch.full_like(visual[..., 0], text))


def kept(budget, scores, ask):
    return budget.kept(scores, ask, budget.threshold(scores, ask))


def chosen_by_definition(visual, text, keep, p_remain):
    ranked = sorted(range(len(visual)), key=lambda m: (-visual[m], m))
    mass, covered = text, 0
    for m in ranked:
        mass += visual[m]
        covered += mass <= p_remain
    floor = covered + 1 if p_remain > 0 else 0
    count = max(floor, int(keep * len(visual) + 1e-6), 1)
    return sorted(ranked[:count])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 23),
    st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.3, 0.7, 0.97]),
    st.sampled_from([0.0, 0.2, 0.8]),
    st.integers(0, 99),
)
def test_a_row_budget_equals_the_definition(blocks, keep, p_remain, text, seed):
    scores = probabilities(3, blocks, text, seed)
    found = kept(RowBudget(), scores, Ask(keep, p_remain))
    for row, visual in zip(found[0, 1], scores.blocks[0, 1].tolist(), strict=True):
        expected = chosen_by_definition(visual, text, keep, p_remain)
        assert row.nonzero().flatten().tolist() == expected


def test_ties_go_to_the_lowest_index():
    blocks = torch.full((1, 1, 1, 8), 0.1)
    blocks[..., 5] = 0.2
    for p_remain in (0.0, 1e-9):
        found = kept(RowBudget(), Scores(blocks), Ask(0.375, p_remain))[0, 0, 0]
        assert found.nonzero().flatten().tolist() == [0, 1, 5]


def test_mass_binds_where_attention_is_spread_out_and_top_k_where_it_is_not():
    flat = Scores(torch.full((1, 1, 1, 20), 0.05))
    peaked = torch.full((1, 1, 1, 20), 0.1 / 19)
    peaked[..., 3] = 0.9
    assert kept(RowBudget(), flat, Ask(0.1, 0.3)).sum() in (6, 7)  # 0.05 is not representable
    assert kept(RowBudget(), Scores(peaked), Ask(0.1, 0.3)).sum() == 2


def test_text_mass_counts_so_that_text_heavy_rows_need_few_blocks():
    found = kept(RowBudget(), probabilities(1, 20, text=0.8), Ask(0.1, 0.3))
    assert found.sum(-1).max() == 2


@pytest.mark.parametrize(
    ("keep", "blocks", "count"), [(1 - 0.8, 10, 2), (1 - 0.9, 10, 1), (0.01, 5, 1), (1.0, 5, 5)]
)
def test_the_blocks_of_a_row_are_a_share_and_never_lost_to_rounding(keep, blocks, count):
    assert Ask(keep).per_row(blocks) == count


def test_forced_blocks_are_kept_on_top_and_blocks_without_a_score_are_not():
    scores = probabilities(6, 6)
    scores.blocks[..., 2] = 0.0
    found = kept(RowBudget(), scores._replace(forced=torch.eye(6, dtype=torch.bool)), Ask(0.2))
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert diagonal[..., [0, 1, 3, 4, 5]].all() and not found[..., 2].any()
    assert found.sum(-1).max() <= RowBudget().max_count(6, 1, Ask(0.2)) == 2


@pytest.mark.parametrize("across_heads", [False, True])
def test_a_mixed_budget_gives_half_to_rows_and_half_to_the_best(across_heads):
    scores = probabilities(10, 20, batch=2)
    scores.blocks[:, :, 3] *= 50
    budget, ask = MixedBudget(0.5, across_heads), Ask(0.3)
    found = kept(budget, scores, ask)
    assert (found.sum(-1) >= 3).all() and found[:, :, 3].sum(-1).min() > 15
    axes = (1, 2, 3) if across_heads else (2, 3)
    total = found.shape[1] * 200 if across_heads else 200
    assert (found.sum(axes) == round(0.3 * total)).all()
    assert budget.compares_heads == across_heads


def by_mass(blocks, forced, text, mass):
    """The fewest of a set that have a share of its sum, what is certain counted first."""
    total = blocks.sum() + text
    covered, found = blocks[forced].sum() + text, forced.clone()
    for i in blocks.masked_fill(forced, -1.0).flatten().argsort(descending=True).tolist():
        if covered >= mass * total or blocks.flatten()[i] <= 0:
            break
        found.view(-1)[i] = True
        covered += blocks.flatten()[i]
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([0.1, 0.35, 0.8, 0.97]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_shared_mass_budget_keeps_the_fewest_blocks(mass, text, forces, across_heads, seed):
    scores = probabilities(6, 9, text, seed)
    rows = torch.rand(1, 2, 6, 1, generator=torch.Generator().manual_seed(seed + 1))
    scores = Scores(scores.blocks * rows * 4, scores.text)
    diagonal = torch.eye(6, 9, dtype=torch.bool)
    if forces:
        scores = scores._replace(forced=diagonal)
    found = kept(MassBudget(mass, True, across_heads), scores, Ask(1.0))[0]
    certain = (diagonal if forces else torch.zeros_like(diagonal)).expand(2, -1, -1)
    blocks, texts = scores.blocks[0].double(), scores.text[0].double()
    if across_heads:
        expected = by_mass(blocks, certain, texts.sum(), mass)
    else:
        expected = torch.stack(
            [by_mass(blocks[h], certain[h], texts[h].sum(), mass) for h in range(2)]
        )
    best = torch.nn.functional.one_hot(scores.blocks[0].argmax(-1), 9).bool()
    assert torch.equal(found, expected | best)  # every row keeps its best


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.4]), st.integers(0, 99))
def test_a_mass_budget_of_rows_exceeds_the_share_and_has_a_floor(mass, least, seed):
    scores = Scores(probabilities(5, 11, seed=seed).blocks * 7)  # need not sum to 1
    found = kept(MassBudget(mass, least=least), scores, Ask(1.0))
    assert (found.sum(-1) >= max(1, int(least * 11))).all()
    blocks = scores.blocks
    share = (blocks * found).sum(-1) / blocks.sum(-1)
    assert (share >= mass - 1e-6).all()
    smallest = blocks.masked_fill(~found, torch.inf).amin(-1)
    without = share - smallest / blocks.sum(-1)
    count = found.sum(-1)
    assert ((without <= mass + 1e-6) | (count <= max(1, int(least * 11)))).all()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mass": 1.5}, "mass must lie"),
        ({"least": -1.0}, "least must lie"),
        ({"across_heads": True}, "needs across_rows"),
    ],
)
def test_a_mass_budget_refuses_what_it_cannot_keep(knobs, words):
    with pytest.raises(ValueError, match=words):
        MassBudget(**knobs)


def test_a_positive_budget_keeps_what_has_a_score():
    blocks = torch.tensor([[[[0.0, 2.0, torch.nan, 1e-38, 0.0]]]])
    forced = torch.tensor([[True, False, False, False, False]])
    found = kept(PositiveBudget(), Scores(blocks, None, forced), Ask(0.1))
    assert found.tolist() == [[[[True, True, True, True, False]]]]
