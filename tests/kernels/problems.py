"""Random block-sparse problems for the kernel tests."""

import torch


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


def masked_sdpa(query, key, value, mask):
    """Computes the same-dtype SDPA twin with a mask (B, H, N, M); empty rows give 0."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~mask, -torch.inf)
    )
    return output.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)


def _drawn(generator, options):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


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
    names = ("needs_value", "needs_spread", "needs_variance")
    flags = {name: _drawn(generator, [False, True, True]) for name in names}
    query, key, value = fused.unbind(2)
    block = _drawn(generator, [1, 5, 16, 32, 100])
    tensors = {"query": query, "key": key, "value": value, "valid": valid, "order": order}
    return tensors | flags | {"block": block}


def check_summary(found, problem, oracle):
    """Compares `BlockStatistics` with the fp64 oracle of each tensor."""
    block, valid, order = problem["block"], problem["valid"], problem["order"]
    names = {
        "query": ("query_mean", "query_spread", None),
        "key": ("key_mean", "key_spread", "key_variance"),
        "value": ("value_mean", None, None),
    }
    asked = {
        "query_mean": True,
        "key_mean": True,
        "value_mean": problem["needs_value"],
        "query_spread": problem["needs_spread"],
        "key_spread": problem["needs_spread"],
        "key_variance": problem["needs_variance"],
    }
    for tensor, fields in names.items():
        *expected, counts = oracle(problem[tensor], block, valid, order)
        for field, wanted in zip(fields, expected, strict=True):
            if field is None:
                continue
            summary = getattr(found, field)
            assert (summary is not None) == asked[field], field
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
    return {
        "scores": scores[..., :-1],
        "top_k": min(blocks, _drawn(generator, [1, 1, 3, blocks // 2 + 1, blocks])),
        "p_remain": min(1.0, _drawn(generator, [0.0, 1e-9, 0.1, 1.0, reachable, reachable])),
        "text": text,
        "forced": forced.to(device) if _drawn(generator, [False, True]) else None,
    }


def check_selection(found, problem, oracle):
    """Compares indices, counts and kept with the oracle of each row."""
    indices, counts, kept = (x.cpu() for x in found)
    scores, text, forced = (
        None if x is None else x.cpu() for x in map(problem.get, ("scores", "text", "forced"))
    )
    assert indices.dtype == counts.dtype == torch.int32 and kept.dtype == torch.bool
    assert indices.is_contiguous() and counts.is_contiguous() and kept.shape == scores.shape
    for row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        place = tuple(row)
        expected = oracle(
            scores[place].tolist(),
            problem["top_k"],
            problem["p_remain"],
            0.0 if text is None else float(text[place]),
            None if forced is None else forced[place[2]].tolist(),
        )
        assert kept[place].nonzero().flatten().tolist() == expected
        assert int(counts[place]) == len(expected)
        assert indices[place].tolist() == expected + [0] * (indices.shape[-1] - len(expected))
