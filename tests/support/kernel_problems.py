"""Random block-sparse problems for the kernel tests."""

import torch

from diffaccel.kernels import Centroids
from diffaccel.kernels.block_statistics.call import OPTIONAL


def random_lists(batch, heads, query_blocks, key_blocks, most, least=0, seed=0, device="cpu"):
    """Draws ascending lists (B, H, NQ, most) and counts; unused entries hold junk blocks."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, query_blocks)
    counts = torch.randint(least, most + 1, shape, generator=generator)
    ranking = torch.rand(*shape, key_blocks, generator=generator).argsort(-1)[..., :most]
    is_listed = torch.arange(most) < counts.unsqueeze(-1)
    listed = ranking.masked_fill(~is_listed, key_blocks).sort(-1).values
    junk = torch.randint(0, key_blocks, listed.shape, generator=generator)
    indices = torch.where(is_listed, listed, junk)
    return indices.int().to(device), counts.int().to(device)


def full_lists(batch, heads, query_blocks, key_blocks, device="cpu"):
    """Lists every key block for every query block."""
    indices = torch.arange(key_blocks, dtype=torch.int32, device=device)
    counts = torch.full((batch, heads, query_blocks), key_blocks, dtype=torch.int32)
    return indices.expand(batch, heads, query_blocks, -1), counts.to(device)


def random_tokens(batch, queries, keys, heads, dim, dtype=torch.float32, seed=0, device="cpu"):
    """Draws query (B, N, H, D), key and value (B, M, H, D) with unit variance."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim)
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(tensor.to(device, dtype) for tensor in drawn)


def masked_sdpa(query, key, value, mask, scale=None):
    """Computes the same-dtype SDPA twin with a mask (B, H, N, M); empty rows give 0."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~mask, -torch.inf), scale=scale
    )
    return output.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)


def _drawn(generator, options):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def block_sparse_problem(seed, dtype=None, device="cpu"):
    """Draws tokens (views of a fused tensor), and arguments of block-sparse attention.

    Lists are random, a band around the diagonal, or everything; masks, text, epilogue and
    centroids come and go, and padding holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*options):
        return _drawn(generator, options)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def valid(length):
        return (torch.rand(batch, length, generator=generator) < drawn(0.1, 0.7, 0.95)).to(device)

    batch, heads, dim = drawn(1, 2, 3), drawn(1, 2, 3), drawn(8, 32, 40, 64, 72, 80, 96, 128)
    queries, keys, text = drawn(1, 15, 64, 111, 150), drawn(1, 17, 63, 128, 150), drawn(0, 1, 20)
    block_q, block_k = drawn(16, 20, 64, 128), drawn(16, 25, 32, 128)
    dtype = dtype or drawn(torch.float32, torch.float16, torch.bfloat16)
    query = normal(batch, queries, 2, heads, dim).to(device, dtype)[:, :, 0]
    fused = normal(batch, keys + text, 2, heads, dim).to(device, dtype)
    blocks = -(-queries // block_q), -(-keys // block_k)
    arguments = {"block_q": block_q, "block_k": block_k, "scale": drawn(None, 0.05, 0.25)}
    if drawn(False, True):
        arguments["key_padding_mask"] = valid(keys)
        fused[:, :keys][~arguments["key_padding_mask"]] = torch.nan
    if text:
        arguments["extra_key"], arguments["extra_value"] = fused[:, keys:].unbind(2)
        if drawn(False, True):
            arguments["extra_padding_mask"] = valid(text)
            fused[:, keys:][~arguments["extra_padding_mask"]] = torch.nan
    if drawn(False, True):
        arguments["row_scale"] = normal(batch, heads, blocks[0]).to(device)
        arguments["row_bias"] = normal(batch, heads, blocks[0], dim).to(device) / 4
    if drawn(False, False, True):
        # rounded to the dtype of the query, as the products on a GPU are
        mean, value, spread = normal(3, batch, heads, blocks[1], dim).to(device, dtype).float()
        log_count = normal(batch, heads, blocks[1]).to(device)
        variance = (spread.square() / 4).to(dtype).float() if drawn(False, True) else None
        arguments["centroids"] = Centroids(mean, value, log_count, variance)
    shared = drawn((batch, heads), (1, heads), (1, 1))
    most = drawn(1, blocks[1], min(3, blocks[1]))
    lists = random_lists(*shared, *blocks, most, seed=seed, device=device)
    pattern = drawn("random", "random", "band", "full")
    if pattern == "full":
        lists = full_lists(*shared, *blocks, device=device)
    elif pattern == "band":
        middle = torch.arange(blocks[0]) * blocks[1] // blocks[0]
        indices = (middle[:, None] + torch.arange(most)).clamp(max=blocks[1] - 1)
        counts = (blocks[1] - middle).clamp(max=most)
        lists = (
            indices.int().expand(*shared, -1, -1).to(device),
            counts.int().expand(*shared, -1).to(device),
        )
    return (query, *fused[:, :keys].unbind(2), *lists), arguments


def summary_problem(seed, dtype=torch.float32, device="cpu"):
    """Draws the arguments of block statistics: views of a fused tensor, padding that is NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = _drawn(generator, [1, 2, 3]), _drawn(generator, [1, 2, 3])
    length, dim = _drawn(generator, [1, 15, 16, 37, 63, 70]), _drawn(generator, [8, 24, 32, 40])
    fused = torch.randn(batch, length, 3, heads, dim, generator=generator)
    fused = (fused + _drawn(generator, [0.0, 30.0])).to(device, dtype)
    valid = order = None
    if _drawn(generator, [False, True]):
        share = torch.rand(batch, 1, generator=generator) * 1.2
        valid = torch.rand(batch, length, generator=generator) < share
        valid[0, : _drawn(generator, [0, 16, 40])] = False
        valid = valid.to(device)
        fused[~valid] = torch.nan
    if _drawn(generator, [False, True]):
        order = torch.randperm(length, generator=generator)
        order = order.to(device, _drawn(generator, [torch.int32, torch.int64]))
    needs = frozenset(name for name in OPTIONAL if _drawn(generator, [False, True, True]))
    query, key, value = fused.unbind(2)
    block = _drawn(generator, [1, 5, 16, 32, 100])
    tensors = {"query": query, "key": key, "value": value, "valid": valid, "order": order}
    return tensors | {"needs": needs, "block": block}


def check_summary(found, problem, oracle):
    """Compares `BlockStatistics` with the fp64 oracle of each tensor."""
    block, valid, order = problem["block"], problem["valid"], problem["order"]
    asked = {"query_mean", "key_mean", *problem["needs"]}
    for tensor in ("query", "key", "value"):
        mean, spread, variance, counts = oracle(problem[tensor], block, valid, order)
        expected = {"mean": mean, "spread": spread, "variance": variance}
        expected["deviation"] = variance.sum(-1).sqrt()
        for kind, wanted in expected.items():
            summary = getattr(found, f"{tensor}_{kind}", None)
            assert (summary is not None) == (f"{tensor}_{kind}" in asked), (tensor, kind)
            if summary is not None:
                assert summary.dtype == torch.float32 and summary.is_contiguous()
                torch.testing.assert_close(summary.double().cpu(), wanted, atol=1e-5, rtol=1e-5)
        assert found.counts.dtype == torch.float32
        assert len(found.counts) == (1 if valid is None else len(valid))
        assert torch.equal(found.counts.double().cpu().expand_as(counts), counts)


def selection_problem(seed, device="cpu", blocks=None):
    """Draws the arguments of block selection: ties, zeros, and sums that are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [_drawn(generator, [1, 2]), _drawn(generator, [1, 2]), _drawn(generator, [1, 2, 4])]
    blocks = blocks or _drawn(generator, [1, 2, 7, 16, 33, 40])
    levels = _drawn(generator, [2, 5, 1000])
    unit = 2.0 ** -(2 * blocks * levels).bit_length()
    scores = torch.randint(levels, (*sizes, blocks + 1), generator=generator) * unit
    is_kept = torch.rand(*sizes, 1, generator=generator) < 0.8
    scores = torch.where(is_kept, scores, scores * (scores == scores.amax(-1, keepdim=True)))
    scores = scores.to(device)
    text = scores[..., -1] if _drawn(generator, [False, True]) else None
    total = int(scores[0, 0, 0].sum() / unit)
    reachable = unit * int(torch.randint(total + 1, (1,), generator=generator))
    forced = torch.rand(sizes[2], blocks, generator=generator) < _drawn(generator, [0.1, 0.5])
    shape = _drawn(generator, [1, sizes[0]]), sizes[1]
    budgets = torch.randint(0, blocks + 2, shape, generator=generator)
    budgets = budgets.int().to(device) if _drawn(generator, [False, False, True]) else None
    return {
        "budgets": budgets,
        "scores": scores[..., :-1],
        "top_k": min(blocks, _drawn(generator, [1, 1, 3, blocks // 2 + 1, blocks])),
        "p_remain": min(1.0, _drawn(generator, [0.0, 1e-9, 0.1, 1.0, reachable, reachable])),
        "text": text,
        "forced": forced.to(device) if _drawn(generator, [False, True]) else None,
    }


def check_selection(found, problem, oracle):
    """Compares indices, counts and kept with the oracle of each row."""
    indices, counts, kept = (x.cpu() for x in found)
    budgets = problem.get("budgets")
    top_k = torch.full(kept.shape[:2], problem["top_k"])
    if budgets is not None:
        top_k = budgets.cpu().clamp(min=1).minimum(top_k)
    scores, text, forced = (
        None if x is None else x.cpu() for x in map(problem.get, ("scores", "text", "forced"))
    )
    assert indices.dtype == counts.dtype == torch.int32 and kept.dtype == torch.bool
    assert indices.is_contiguous() and counts.is_contiguous() and kept.shape == scores.shape
    for row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        place = tuple(row)
        expected = oracle(
            scores[place].tolist(),
            int(top_k[place[:2]]),
            problem["p_remain"],
            0.0 if text is None else float(text[place]),
            None if forced is None else forced[place[2]].tolist(),
        )
        assert kept[place].nonzero().flatten().tolist() == expected
        assert int(counts[place]) == len(expected)
        assert indices[place].tolist() == expected + [0] * (indices.shape[-1] - len(expected))
