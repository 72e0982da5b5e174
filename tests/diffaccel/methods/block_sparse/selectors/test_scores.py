"""What each selector thinks of blocks, against its definition, block by block in plain loops."""

import math

import pytest
import torch
from block_calls import all_rows, block_call, summarised

from diffaccel.methods.block_sparse.budgets import Ask, MassBudget, Scores
from diffaccel.methods.block_sparse.selectors import (
    BlockGate,
    ExpectedError,
    FlexPrefill,
    HashedBuckets,
    OwnBlocks,
    PooledAttention,
    ProxyDeviations,
    RegionRouting,
    SelfSimilarity,
    SubBlocks,
    TreeSearch,
    VideoBlockGate,
    VisualAttention,
)

BLOCK = 16


def runs(x, call, sample=1, head=1):
    """Tokens of each block of one head, fp64; padded ones left out."""
    valid = call.visual.valid
    keep = torch.ones(x.shape[1], dtype=torch.bool) if valid is None else valid[sample]
    tokens = x[sample, :, head].double()
    return [t[k] for t, k in zip(tokens.split(BLOCK), keep.split(BLOCK), strict=True)]


def with_padding(call):
    """The call with the end of its second sample padded: half of a block and all of the last."""
    valid = torch.ones(call.visual.key.shape[:2], dtype=torch.bool)
    valid[1, 88:] = False
    visual = call.visual
    object.__setattr__(visual, "valid", valid)
    return summarised(call)


CALLS = {
    "ragged": lambda: block_call(0.7),
    "padded": lambda: with_padding(block_call(0.7, seed=3)),
}


@pytest.fixture(params=CALLS, ids=list(CALLS))
def call(request):
    return CALLS[request.param]()


def real(means):
    """Numbers of the blocks that have tokens."""
    return [m for m, x in enumerate(means) if len(x)]


def test_visual_attention_is_the_softmax_of_means_with_their_counts(call):
    keys, queries = runs(call.visual.key, call), runs(call.visual.query, call)
    score = VisualAttention().score(all_rows(call))[1, 1].double()
    for n in real(queries):
        q = queries[n].mean(0) * call.visual.scale
        logits = [q @ keys[m].mean(0) + math.log(len(keys[m])) for m in real(keys)]
        expected = torch.stack(logits).softmax(0)
        torch.testing.assert_close(score[n, real(keys)], expected, atol=1e-6, rtol=1e-5)
    assert (score[:, [m for m in range(call.number) if m not in real(keys)]] == 0).all()


def test_expected_error_is_mass_times_the_deviation_of_the_weights_and_of_the_values(call):
    keys, queries, values = (
        runs(x, call) for x in (call.visual.key, call.visual.query, call.visual.value)
    )
    rows = all_rows(call)
    score, mass = ExpectedError().score(rows)[1, 1].double(), rows.probability[1, 1].double()
    for n in real(queries):
        power = queries[n].mean(0) ** 2 + queries[n].var(0, correction=0)
        for m in real(keys):
            exponent = (power * keys[m].var(0, correction=0)).sum() * call.visual.scale**2
            weights = exponent.clamp(max=4.0).expm1().sqrt()
            deviation = values[m].var(0, correction=0).sum().sqrt()
            expected = mass[n, m] * weights * deviation
            torch.testing.assert_close(score[n, m], expected, atol=1e-6, rtol=1e-4)


def deviations(call):
    keys, queries = runs(call.visual.key, call), runs(call.visual.query, call)
    means = torch.stack([keys[m].mean(0) for m in real(keys)])
    centered, variance = means - means.mean(0), means.var(0, correction=0)
    return torch.stack(
        [
            centered @ queries[n].mean(0) / (queries[n].mean(0) ** 2 @ variance).sqrt()
            for n in real(queries)
        ]
    )


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_proxy_deviations_keep_what_lies_above_tau(call, tau):
    expected = deviations(call)
    count = len(expected)
    score = ProxyDeviations(tau).score(all_rows(call))[1, 1, :count].double()
    torch.testing.assert_close(
        score[:, :count], (expected - tau).clamp(min=0), atol=1e-5, rtol=1e-4
    )
    assert (score[:, count:] == 0).all() and 0 < (score > 0).sum() < score.numel() / 2
    ranked = ProxyDeviations(None).score(all_rows(call))[1, 1, :count, :count]
    assert torch.equal(ranked.argsort(-1), expected.argsort(-1)) and (ranked > 0).all()


def test_proxy_deviations_force_diagonal_and_sinks():
    order = block_call().order
    forced = ProxyDeviations(diagonal=1, sinks=2).forced(order)
    for n in range(order.blocks):
        for m in range(order.blocks):
            assert forced[n, m] == (abs(n - m) <= 1 or n < 2 or m < 2)
    assert ProxyDeviations(diagonal=-1).forced(order) is None
    assert ProxyDeviations(1.0).share(order) == pytest.approx(0.158655, abs=1e-5)


def products(call, head=1):
    keys = runs(call.visual.key, call, head=head)
    queries = runs(call.visual.query, call, head=head)
    return torch.stack(
        [
            torch.stack([queries[n].mean(0) @ keys[m].mean(0) for m in real(keys)])
            for n in real(queries)
        ]
    )


def test_block_gate_ranks_by_the_product_of_means(call):
    expected = products(call)
    count = len(expected)
    score = BlockGate().score(all_rows(call))[1, 1]
    assert torch.equal(score[:count, :count].argsort(-1), expected.argsort(-1))
    assert (score[:, :count] > 0).all() and (score[:, count:] == 0).all()
    assert torch.equal(BlockGate().forced(call.order), torch.eye(call.number).bool())


def test_region_routing_ranks_by_the_sum_over_heads_and_all_heads_alike(call):
    expected = products(call, 0) + products(call, 1)
    count = len(expected)
    score = RegionRouting().score(all_rows(call))
    assert score.shape[1] == 1 and RegionRouting().compares_heads
    assert torch.equal(score[1, 0, :count, :count].argsort(-1), expected.argsort(-1))


def by_threshold(g, tau, is_own):
    """VMoBA's rule over one set: which entries of g are kept."""
    shifted = (g - g.min()) / max(g.max() - g.min(), 1e-6)
    total = shifted.sum()
    need = max(0.0, tau - float(shifted[is_own].sum() / total))
    kept, found = is_own.clone(), 0.0
    for i in shifted.masked_fill(is_own, -1).flatten().argsort(descending=True).tolist():
        if found >= need:
            break
        kept.view(-1)[i] = True
        found += float(shifted.flatten()[i] / total)
    return kept


@pytest.mark.parametrize("tau", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("ranking", ["row", "head", "overall"])
def test_video_block_gate_keeps_a_share_of_the_similarity_of_its_set(ranking, tau):
    call = block_call(0.7, tokens=112, seed=5)
    selector = VideoBlockGate(ranking, tau)
    forced = selector.forced(call.order)
    scores = Scores(selector.score(all_rows(call)), None, forced)
    budget = selector.budget
    kept = budget.kept(scores, Ask(1.0), budget.threshold(scores, Ask(1.0)))[1]
    g = torch.stack([products(call, head) for head in range(2)])
    own = torch.eye(call.number).bool()
    if ranking == "overall":
        expected = by_threshold(g, tau, own.expand(2, -1, -1).clone())
    elif ranking == "head":
        expected = torch.stack([by_threshold(x, tau, own) for x in g])
    else:
        expected = torch.stack(
            [
                torch.stack([by_threshold(x, tau, o) for x, o in zip(y, own, strict=True)])
                for y in g
            ]
        )
    if tau == 1.0:  # what has no similarity at all is kept or not
        assert (kept | ~expected).all()
    elif ranking == "row":  # the rule keeps at least one more than the own block, as MoBA does
        assert (kept | ~expected).all() and (kept & ~expected).sum(-1).max() <= 1
    else:
        extra = kept & ~expected  # the best block of a row is always computed
        best = torch.nn.functional.one_hot(g.argmax(-1), call.number).bool()
        assert (kept | ~expected).all() and not (extra & ~best).any()


def test_video_block_gate_without_threshold_ranks_across_rows_and_heads():
    call = block_call(0.7, tokens=112, seed=5)
    selector = VideoBlockGate("overall", None)
    scores = Scores(selector.score(all_rows(call)))
    kept = selector.budget.kept(scores, Ask(0.3), selector.budget.threshold(scores, Ask(0.3)))[1]
    g = torch.stack([products(call, head) for head in range(2)])
    best = g.flatten().topk(round(0.3 * g.numel())).indices
    assert selector.compares_heads and kept.flatten()[best].float().mean() > 0.85


@pytest.mark.parametrize("smooth_keys", [True, False])
def test_self_similarity_is_the_mean_cosine_of_all_pairs_in_a_block(call, smooth_keys):
    selector = SelfSimilarity(0.4, smooth_keys)
    query_similarity, key_similarity = selector._similarity(call)
    keys = runs(call.visual.key, call)
    shift = torch.cat(keys).mean(0) if smooth_keys else 0.0
    for found, blocks in (
        (query_similarity, runs(call.visual.query, call)),
        (key_similarity, [k - shift for k in keys]),
    ):
        for m in real(blocks):
            unit = blocks[m] / blocks[m].norm(dim=-1, keepdim=True)
            cosine = (unit @ unit.T).mean()
            torch.testing.assert_close(found[1, 1, m].double(), cosine, atol=1e-5, rtol=1e-4)


def test_blocks_that_are_not_alike_within_are_always_computed_and_the_rest_share_the_mass():
    call = block_call(0.7, tokens=112)
    generator = torch.Generator().manual_seed(1)
    for x, m in ((call.visual.key, 2), (call.visual.query, 4)):
        place = slice(m * BLOCK, (m + 1) * BLOCK)
        x[:, place] = torch.randn(x[:, place].shape, generator=generator)
    call = summarised(call)
    score = SelfSimilarity(0.3, smooth_keys=False).score(all_rows(call))
    infinite = torch.zeros(call.number, call.number, dtype=torch.bool)
    infinite[4], infinite[:, 2] = True, True
    assert torch.equal(score.isposinf(), infinite.expand_as(score))
    mass = VisualAttention().score(all_rows(call))
    mass = mass.masked_fill(infinite[:, :] & (torch.arange(call.number) == 2), 0.0)
    expected = (mass / mass.sum(-1, keepdim=True))[:, :, 0]
    torch.testing.assert_close(score[:, :, 0, 3], expected[..., 3], atol=1e-6, rtol=1e-4)
    assert SelfSimilarity.decides


def searched(query, key, call, top_k):
    """HiP's search for one mean query: chunks by the key in their middle, halved."""
    size = BLOCK
    while -(-len(key) // size) > 2 * top_k:
        size *= 2
    alive = list(range(-(-len(key) // size)))
    while True:
        worth = {}
        for chunk in alive:
            start, stop = chunk * size, min((chunk + 1) * size, len(key))
            worth[chunk] = float(query @ key[start + (stop - start) // 2])
        best = sorted(alive, key=lambda chunk: -worth[chunk])[:top_k]
        if size == BLOCK:
            return set(best)
        size //= 2
        alive = [c for b in best for c in (2 * b, 2 * b + 1) if c * size < len(key)]


@pytest.mark.parametrize("tokens", [16, 48, 112])
def test_tree_search_halves_the_best_chunks(tokens):
    call = block_call(0.7, tokens=16 * 21 + 5)
    score = TreeSearch(tokens).score(all_rows(call))[1, 1]
    key = call.visual.key[1, :, 1]
    for n, run in enumerate(runs(call.visual.query, call)):
        found = set(score[n].nonzero().flatten().tolist())
        assert found == searched(run.mean(0).float(), key, call, tokens // BLOCK)
    assert TreeSearch(tokens).share(call.order) == pytest.approx(tokens // BLOCK / call.number)


def test_tree_search_finds_no_padding_and_picks_the_middle_of_what_is_real():
    call = with_padding(block_call(0.7))
    call.visual.key[1, 88:] = torch.nan
    call = summarised(call)
    score = TreeSearch(112).score(all_rows(call))
    assert (score[1, ..., 6:] == 0).all() and (score[1, :, :6, :6] > 0).all()
    expected = runs(call.visual.query, call)[2].mean(0) @ call.visual.key[1, 84, 1].double()
    value = 1 + expected if expected > 0 else 1 / (1 - expected)
    torch.testing.assert_close(score[1, 1, 2, 5].double(), value, atol=1e-4, rtol=1e-4)


def gray_sequence(bits):
    if bits == 0:
        return [()]
    shorter = gray_sequence(bits - 1)
    return [(0, *x) for x in shorter] + [(1, *x) for x in reversed(shorter)]


def test_hashed_buckets_count_the_pairs_that_share_a_bucket():
    call = block_call(0.7, tokens=111)
    selector = HashedBuckets(projections=4, bucket=20, seed=3)
    directions = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))
    place = {code: i for i, code in enumerate(gray_sequence(4))}
    bucket_of = []
    for x in (call.visual.query, call.visual.key):
        signs = (x[1, :, 1] @ directions > 0).int().tolist()
        codes = [place[tuple(sign)] for sign in signs]
        ranked = sorted(range(111), key=lambda i: codes[i])
        buckets = [0] * 111
        for rank, token in enumerate(ranked):
            buckets[token] = rank * 5 // 111
        bucket_of.append(buckets)
    score = selector.score(all_rows(call))[1, 1]
    for n in range(call.number):
        for m in range(call.number):
            pairs = sum(
                bucket_of[0][i] == bucket_of[1][j]
                for i in range(n * 16, min(111, n * 16 + 16))
                for j in range(m * 16, min(111, m * 16 + 16))
            )
            assert score[n, m].item() == pytest.approx(pairs, abs=1e-6)


def test_hashes_of_equal_tokens_share_a_bucket_and_padded_ones_none():
    call = with_padding(block_call(0.01, dim=64))
    call.visual.query.copy_(call.visual.key)
    call.visual.key[1, 88:] = torch.nan
    score = HashedBuckets(bucket=16).score(all_rows(summarised(call)))
    assert (score[0, :, :6].argmax(-1) == torch.arange(6)).float().mean() > 0.6
    assert (score[1, ..., 6] == 0).all() and score[1, ..., :5].isfinite().all()


@pytest.mark.parametrize("parts", [(1, 1), (4, 2), (16, 16)])
def test_sub_blocks_add_the_mass_of_pairs_of_parts(call, parts):
    keys, queries = runs(call.visual.key, call), runs(call.visual.query, call)
    valid = call.visual.valid
    keep = torch.ones(call.visual.key.shape[1]).bool() if valid is None else valid[1]
    score = SubBlocks(*parts).score(all_rows(call))[1, 1].double()
    pieces = []
    for x, count in ((call.visual.query, parts[0]), (call.visual.key, parts[1])):
        tokens, size = x[1, :, 1].double(), BLOCK // count
        pieces.append(
            [
                [t[k] for t, k in zip(b.split(size), v.split(size), strict=True) if k.any()]
                for b, v in zip(tokens.split(BLOCK), keep.split(BLOCK), strict=True)
            ]
        )
    for n in real(queries):
        mass = [
            sum(
                (call.visual.scale * a.mean(0) @ b.mean(0)).exp() * len(b)
                for a in pieces[0][n]
                for b in pieces[1][m]
            )
            for m in real(keys)
        ]
        expected = torch.stack(mass) / sum(mass)
        torch.testing.assert_close(score[n, real(keys)], expected, atol=1e-6, rtol=1e-4)


def test_sub_blocks_may_take_the_largest_pair_instead():
    call = block_call(0.7, tokens=112)
    keys = call.visual.key[1, :, 1].double().view(7, 4, 4, -1).mean(2)
    query = call.visual.query[1, :, 1].double().view(7, 4, 4, -1).mean(2)
    logits = torch.einsum("nad,mbd->nmab", query, keys) * call.visual.scale
    expected = logits.amax((2, 3)).softmax(-1)
    score = SubBlocks(join="max").score(all_rows(call))[1, 1].double()
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-4)


def test_sub_blocks_of_whole_blocks_are_the_attention_of_means(call):
    with_queries = real(runs(call.visual.query, call))
    found, expected = (x.score(all_rows(call)) for x in (SubBlocks(1, 1), VisualAttention()))
    torch.testing.assert_close(found[:, :, with_queries], expected[:, :, with_queries])


def patterned_call():
    """Head 0 is smooth; all of head 1 read block 3, token by token, which means do not tell."""
    call = block_call(0.02, tokens=160, batch=1, dim=64, seed=2)
    generator = torch.Generator().manual_seed(0)
    code = torch.nn.functional.normalize(torch.randn(160, 64, generator=generator), dim=-1)
    code = code.view(10, 16, 64)
    code = code - code.mean(1, keepdim=True)
    call.visual.key[0, :, 1] = 12 * code.flatten(0, 1)
    call.visual.query[0, :, 1] = 12 * code[3].repeat(10, 1)
    return summarised(call)


def test_flexprefill_trusts_means_where_they_predict_and_else_keeps_lines():
    call = patterned_call()
    selector = FlexPrefill(mass=0.9, divergence=0.1, rows=160, least=16)
    found = selector._patterns(call)
    exact = (call.visual.query[0] * call.visual.scale).transpose(0, 1) @ call.visual.key[
        0
    ].permute(1, 2, 0)
    mass = exact.softmax(-1).view(2, 10, 16, 10, 16).sum((2, 4))
    assert found.is_aware.tolist() == [[True, False]]
    assert found.columns[0, 1].nonzero().flatten().tolist() == [3]
    assert torch.equal(found.least_columns[0, 1], found.columns[0, 1])
    for head in range(2):
        apart = [mass[head].diagonal(offset).sum() for offset in range(-9, 10)]
        for lines, weights in (
            (found.columns[0, head], mass[head].sum(0)),
            (found.diagonals[0, head], torch.stack(apart)),
        ):
            ranked, place = weights.sort(descending=True)
            needed = int((ranked.cumsum(0) < 0.9 * ranked.sum()).sum()) + 1
            assert sorted(place[:needed].tolist()) == lines.nonzero().flatten().tolist()
    score = selector.score(all_rows(call))[0]
    n, m = torch.arange(10)[:, None], torch.arange(10)
    lines = found.columns[0, 1][m] | found.diagonals[0, 1][m - n + 9]
    assert torch.equal(score[1], torch.where(lines, torch.inf, 0.0))
    least = found.least_columns[0, 0][m] | found.least_diagonals[0, 0][m - n + 9]
    expected = VisualAttention().score(all_rows(call))[0, 0].masked_fill(least, torch.inf)
    torch.testing.assert_close(score[0], expected)


def test_flexprefill_shares_the_mass_out_over_all_rows_of_a_head():
    call = patterned_call()
    scores = VisualAttention().score(all_rows(call))
    budget = FlexPrefill(mass=0.9).budget
    assert budget == MassBudget(0.9, across_rows=True)
    kept = budget.kept(Scores(scores), Ask(1.0), budget.threshold(Scores(scores), Ask(1.0)))
    flat = scores[0, 0].flatten()
    ranked = flat.sort(descending=True)
    needed = int((ranked.values.cumsum(0) < 0.9 * flat.sum()).sum()) + 1
    expected = torch.zeros(100, dtype=torch.bool)
    expected[ranked.indices[:needed]] = True
    best = torch.nn.functional.one_hot(scores[0, 0].argmax(-1), 10).bool()
    assert torch.equal(kept[0, 0], expected.view(10, 10) | best)


def test_own_blocks_take_masks_numbers_and_functions():
    call = block_call(0.7)
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = all_rows(call)
    assert torch.equal(OwnBlocks(mask).score(rows)[0, 0], mask.float())
    per_head = torch.stack([mask, ~mask])
    assert torch.equal(OwnBlocks(per_head).score(rows)[0, 1], (~mask).float())
    assert OwnBlocks(per_head).compares_heads and not OwnBlocks(mask).compares_heads
    own = OwnBlocks(lambda rows: rows.probability[..., :-1])
    assert torch.equal(own.score(rows), PooledAttention().score(rows))
    assert OwnBlocks(mask).share(call.order) == pytest.approx(mask.double().mean().item())


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        (3, TypeError, "tensor or a function"),
        (torch.ones(3), ValueError, "must be \\(NB, NB\\)"),
        (torch.ones(3, 4), ValueError, "must be \\(NB, NB\\)"),
    ],
)
def test_own_blocks_refuse_what_is_no_mask(blocks, error, words):
    with pytest.raises(error, match=words):
        OwnBlocks(blocks)


def test_own_blocks_say_what_does_not_fit_a_call():
    rows = all_rows(block_call())
    with pytest.raises(ValueError, match="mask of the 7 blocks"):
        OwnBlocks(torch.ones(5, 5)).score(rows)
    with pytest.raises(ValueError, match="must give scores"):
        OwnBlocks(lambda rows: torch.ones(3, 7)).score(rows)
