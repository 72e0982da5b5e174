import torch

from diffaccel.kernels import block_statistics
from diffaccel.methods.block_sparse.estimator import block_attention, row_steps
from diffaccel.methods.inputs import ExactTokens


def random_tokens(batch, tokens, heads, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, tokens, heads, channels, generator=generator) for _ in range(3)
    )


def exact(key, valid=None):
    return ExactTokens(key, key, valid)


def test_several_steps_of_work_give_what_one_step_gives(monkeypatch):
    query, key, value = random_tokens(2, 150, 2, 32)
    statistics = block_statistics(query, key, value, 16)
    monkeypatch.setattr("diffaccel.methods.block_sparse.estimator._STEP_ELEMENTS", 100)
    steps = list(row_steps(statistics, 7))
    assert len(steps) > 3
    text = exact(key[:, :7])
    rows = [block_attention(statistics, text, 0.1, step) for step in steps]
    torch.testing.assert_close(torch.cat(rows, 2), block_attention(statistics, text, 0.1))


def test_block_attention_is_token_attention_with_every_key_replaced_by_its_block_mean():
    query, key, value = random_tokens(1, 55, 2, 32, seed=1)
    text_key = random_tokens(1, 9, 2, 32, seed=2)[0]
    scale = 0.3
    found = block_statistics(query, key, value, 16)
    expanded = torch.cat([k.mean(1, keepdim=True).expand_as(k) for k in key.split(16, 1)], 1)
    keys = torch.cat([expanded, text_key], 1).double()
    means = torch.stack([q.mean(1) for q in query.split(16, 1)], 1).double()
    logits = torch.einsum("bnhd,bmhd->bhnm", means, keys) * scale
    weights = logits.softmax(-1).split([16, 16, 16, 7, 9], -1)
    expected = torch.stack([part.sum(-1) for part in weights], -1)
    weights = block_attention(found, exact(text_key), scale)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)


def test_log_count_form_equals_the_reallocation_of_the_paper_for_full_blocks():
    """The paper multiplies the visual share by the block size after a softmax without counts."""
    query, key, value = random_tokens(1, 64, 2, 32, seed=3)
    text_key = random_tokens(1, 5, 2, 32, seed=4)[0]
    found = block_statistics(query, key, value, 16)
    visual = found.query_mean @ found.key_mean.transpose(-1, -2)
    text = found.query_mean @ text_key.permute(0, 2, 3, 1)
    p = torch.cat([visual, text], -1).double().softmax(-1)
    total = 16 * p[..., :4].sum(-1, keepdim=True) + p[..., 4:].sum(-1, keepdim=True)
    expected = torch.cat([16 * p[..., :4], p[..., 4:].sum(-1, keepdim=True)], -1) / total
    weights = block_attention(found, exact(text_key), 1.0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)


def test_padded_blocks_and_padded_text_weigh_nothing():
    query, key, value = random_tokens(3, 48, 2, 32)
    text_key = random_tokens(3, 4, 2, 32)[0]
    valid = torch.ones(3, 48, dtype=torch.bool)
    valid[0, 32:] = False
    valid[2] = False
    text_valid = torch.ones(3, 4, dtype=torch.bool)
    text_valid[1:] = False
    found = block_statistics(query, key, value, 16, valid)
    weights = block_attention(found, exact(text_key, text_valid), 1.0)
    assert (weights[0, :, :, 2] == 0).all()
    assert (weights[1, :, :, 3] == 0).all()
    torch.testing.assert_close(weights[:2].sum(-1), torch.ones(2, 2, 3))
    assert (weights[2] == 0).all()


def test_adding_one_vector_to_all_keys_leaves_the_block_attention_unchanged():
    query, key, value = random_tokens(1, 50, 2, 32)
    text_key = random_tokens(1, 6, 2, 32, seed=5)[0]
    shift = torch.randn(32)
    before = block_attention(block_statistics(query, key, value, 16), exact(text_key), 0.2)
    moved = block_statistics(query, key + shift, value, 16)
    after = block_attention(moved, exact(text_key + shift), 0.2)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)


def test_low_precision_inputs_are_summarised_in_fp32():
    query, key, value = (x.bfloat16() for x in random_tokens(1, 111, 2, 64))
    low = block_statistics(query, key, value, 16)
    high = block_statistics(query.float(), key.float(), value.float(), 16)
    assert low.key_mean.dtype == torch.float32
    assert torch.equal(low.key_mean, high.key_mean)
    assert torch.equal(low.query_spread, high.query_spread)
