import pytest
import torch

from diffaccel.methods.block_sparse.budgets import (
    BUDGETS,
    Ask,
    MassBudget,
    MixedBudget,
    PositiveBudget,
    RowBudget,
    Scores,
    with_mass,
)


def scores(seed=0, batch=2, heads=3, rows=20, blocks=20, forced=None):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(batch, heads, rows, blocks + 1, generator=generator) * 2
    shares = raw.softmax(-1)
    return Scores(shares[..., :-1], shares[..., -1], forced)


def chosen(budget, some, ask):
    return budget.kept(some, ask, budget.threshold(some, ask))


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("row_share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("across_heads", [True, False])
def test_a_mixed_budget_is_spent_exactly(keep, row_share, across_heads):
    some = scores()
    kept = chosen(MixedBudget(row_share, across_heads), some, Ask(keep))
    per_head = kept.sum((2, 3))
    total = round(keep * 400 * (3 if across_heads else 1))
    found = per_head.sum(1) if across_heads else per_head
    least = 20 * (3 if across_heads else 1)  # every row keeps one block
    # What rows get is rounded down, and all of it is spent at a row share of 1.
    assert (found == max(total, least)).all() or row_share == 1.0
    assert (kept.sum(-1) >= 1).all()


def test_a_mixed_budget_goes_to_the_best_scores_by_definition():
    some = scores(seed=3)
    kept = chosen(MixedBudget(0.5), some, Ask(0.3))
    for b in range(2):
        for h in range(3):
            matrix = some.blocks[b, h]
            expected = torch.zeros(20, 20, dtype=torch.bool)
            for row in range(20):
                expected[row, matrix[row].argsort(descending=True)[:3]] = True
            rest = 120 - int(expected.sum())
            ranking = matrix.masked_fill(expected, -1).flatten().argsort(descending=True)
            expected.view(-1)[ranking[:rest]] = True
            assert torch.equal(kept[b, h], expected)


def test_forced_blocks_count_towards_a_mixed_budget():
    own = torch.eye(20, dtype=torch.bool)
    kept = chosen(MixedBudget(0.5), scores(forced=own), Ask(0.3))
    assert kept[..., own].all() and (kept.sum((2, 3)) == 120).all()


@pytest.mark.parametrize("budget", [RowBudget(), MixedBudget(), MixedBudget(0.0)])
def test_every_head_may_have_a_share_of_its_own(budget):
    some = scores()
    keep = torch.tensor([[0.1, 0.3, 1.0], [0.5, 0.05, 0.2]])
    kept = chosen(budget, some, Ask(keep))
    for b in range(2):
        for h in range(3):
            one = slice(h, h + 1)
            alone = Scores(some.blocks[b : b + 1, one], some.text[b : b + 1, one])
            expected = chosen(budget, alone, Ask(float(keep[b, h])))
            assert torch.equal(kept[b, h], expected[0, 0])


@pytest.mark.parametrize("name", BUDGETS)
def test_more_keeps_a_superset(name):
    some, budget = scores(seed=5), BUDGETS[name]
    before = torch.zeros_like(some.blocks, dtype=torch.bool)
    for keep in (0.1, 0.2, 0.4, 0.8):
        kept = chosen(budget, some, Ask(keep))
        assert (kept | ~before).all()
        before = kept


@pytest.mark.parametrize("name", [name for name in BUDGETS if name != "global"])
def test_heads_and_samples_are_independent(name):
    some, budget = scores(seed=6), BUDGETS[name]
    kept = chosen(budget, some, Ask(0.3))
    for b in range(2):
        for h in range(3):
            place = (slice(b, b + 1), slice(h, h + 1))
            alone = chosen(budget, Scores(some.blocks[place], some.text[place]), Ask(0.3))
            assert torch.equal(kept[place], alone)
    assert not budget.compares_heads and BUDGETS["global"].compares_heads


@pytest.mark.parametrize("across_rows", [True, False])
@pytest.mark.parametrize("mass", [0.3, 0.7, 0.95])
def test_a_mass_budget_keeps_the_fewest_blocks_with_that_mass(mass, across_rows):
    some = scores(seed=7)
    kept = chosen(MassBudget(mass, across_rows), some, Ask(0.1))
    found = (some.blocks * kept).sum(-1) + some.text
    if across_rows:
        found = found.mean(-1)
        least = (some.blocks * kept).masked_fill(~kept, torch.inf).flatten(2).amin(-1) / 20
    else:
        least = some.blocks.masked_fill(~kept, torch.inf).amin(-1)
    is_needed = kept.flatten(2).sum(-1) > 20 if across_rows else kept.sum(-1) > 1
    assert (found >= mass - 1e-6).all()
    slack = 0.01 if across_rows else 1e-6  # rows keep one block whatever its score
    assert ((found - least < mass + slack) | ~is_needed).all()


def test_mass_with_text_equals_the_definition():
    some = scores(seed=8)
    probability = torch.cat([some.blocks, some.text[..., None]], -1)
    kept = with_mass(probability, 0.6)
    for row in range(20):
        ranked = some.blocks[1, 2, row].sort(descending=True).values
        sums = ranked.cumsum(0) + some.text[1, 2, row]
        assert int(kept[1, 2, row].sum()) == max(1, int((sums <= 0.6).sum()) + 1)


def test_a_positive_budget_keeps_what_scores():
    some = Scores(torch.tensor([[[[0.0, 1.0, torch.nan, torch.inf, 0.0]]]]))
    assert chosen(PositiveBudget(), some, Ask(0.1)).tolist() == [
        [[[False, True, True, True, False]]]
    ]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MixedBudget(1.5), "row_share must lie in 0 to 1"),
        (lambda: MixedBudget("half"), "row_share must be a number"),
        (lambda: MassBudget(-0.1), "mass must lie in 0 to 1"),
    ],
)
def test_wrong_knobs_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
