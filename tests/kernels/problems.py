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
