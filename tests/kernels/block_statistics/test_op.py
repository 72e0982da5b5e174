"""Block statistics: the CPU path against the fp64 definition, and the door."""

import pytest
import torch

from diffaccel.kernels import block_statistics, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_drawn_problems_match_the_oracle(cases, problems, poisoned_empty, dtype):
    for seed in cases(40):
        problem = problems.summary_problem(seed, dtype)
        found = block_statistics(**problem)
        problems.check_summary(found, problem, reference.block_statistics)


def test_order_equals_a_permuted_copy_bit_for_bit(problems):
    tokens = problems.random_tokens(2, 111, 111, 2, 24)
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(2, 111, generator=generator) < 0.7
    order = torch.randperm(111, generator=generator)
    found = block_statistics(*tokens, 16, valid, order=order, needs_variance=True)
    moved = [x[:, order] for x in tokens]
    expected = block_statistics(*moved, 16, valid[:, order], needs_variance=True)
    for field in expected.__slots__:
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


def test_steps_of_work_do_not_change_the_result(problems):
    tokens = problems.random_tokens(2, 150, 150, 2, 16)
    order = torch.arange(149, -1, -1)
    whole = block_statistics(*tokens, 16, order=order)
    parts = block_statistics(*tokens, 16, order=order, step_elements=1)
    for field in ("query_mean", "value_mean", "key_spread"):
        assert torch.equal(getattr(whole, field), getattr(parts, field)), field


def test_variance_survives_a_large_mean(problems):
    """E[x**2] - mean**2 in fp32 has no correct digit here."""
    query, key, value = problems.random_tokens(1, 64, 64, 1, 16)
    found = block_statistics(query, key + 4096.0, value, 16, needs_variance=True)
    expected = reference.block_statistics(key + 4096.0, 16)[2]
    torch.testing.assert_close(found.key_variance.double(), expected, rtol=1e-4, atol=1e-6)


TOKENS = torch.zeros(2, 40, 2, 16)
BAD = {
    "rank": ({"query": TOKENS[0]}, ValueError, r"one shape \(B, N, H, D\)"),
    "key length": ({"key": TOKENS[:, :39]}, ValueError, "one shape"),
    "empty": (dict.fromkeys(("query", "key", "value"), TOKENS[:, :0]), ValueError, "empty"),
    "dtype mix": ({"key": TOKENS.half()}, TypeError, "one dtype"),
    "double": (dict.fromkeys(("query", "key", "value"), TOKENS.double()), TypeError, "fp32"),
    "block": ({"block": 0}, ValueError, "at least 1"),
    "step": ({"step_elements": 0}, ValueError, "at least 1"),
    "float mask": ({"valid": torch.ones(2, 40)}, TypeError, "must be bool"),
    "mask shape": ({"valid": torch.ones(1, 40) > 0}, ValueError, "one row per sample"),
    "float order": ({"order": torch.arange(40.0)}, TypeError, "int32 or int64"),
    "order length": ({"order": torch.arange(39)}, ValueError, r"\(40,\)"),
    "order repeats": ({"order": torch.zeros(40).long()}, ValueError, "each of 0 to 39 once"),
    "order outside": ({"order": torch.arange(1, 41)}, ValueError, "each of 0 to 39 once"),
    "device": ({"key": TOKENS.to("meta")}, ValueError, "device of query"),
    "backend": ({"backend": "cuda"}, ValueError, "'cpu' or 'triton'"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(change, error, message):
    arguments = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "block": 16}
    with pytest.raises(error, match=message):
        block_statistics(**(arguments | change))


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        block_statistics(TOKENS, TOKENS, TOKENS, 16, backend="triton")


@pytest.mark.parametrize("has_everything", [False, True])
def test_opcheck(problems, has_everything):
    tokens = problems.random_tokens(2, 40, 40, 2, 16)
    valid, order = torch.ones(2, 40) > 0, torch.arange(40)
    options = (valid, order) if has_everything else (None, None)
    rest = (*[has_everything] * 3, 1 << 20, "cpu")
    op = torch.ops.diffaccel.block_statistics.default
    torch.library.opcheck(op, (*tokens, 16, *options, *rest))


def test_compiles_without_a_graph_break(problems):
    tokens = problems.random_tokens(1, 40, 40, 2, 16)

    def run(query):
        found = block_statistics(query, *tokens[1:], 16)
        return found.query_mean * 2, found.counts

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(tokens[0]), run(tokens[0]), strict=True):
        assert torch.equal(found, expected)
