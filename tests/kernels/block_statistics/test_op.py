"""Block statistics: the CPU path against the fp64 definition, and argument checks."""

import pytest
import torch

from diffaccel.kernels import StatisticsCall, block_statistics, reference
from diffaccel.kernels.block_statistics.call import OPTIONAL, check
from diffaccel.kernels.block_statistics.op import summarise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.drawn(40)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_drawn_problems_match_the_oracle(problems, poisoned_empty, dtype, seed):
    problem = problems.summary_problem(seed, dtype)
    found = block_statistics(**problem)
    problems.check_summary(found, problem, reference.block_statistics)


def test_order_equals_a_permuted_copy_bit_for_bit(problems):
    tokens = problems.random_tokens(2, 111, 111, 2, 24)
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(2, 111, generator=generator) < 0.7
    order = torch.randperm(111, generator=generator)
    found = block_statistics(*tokens, 16, valid, order=order, needs=OPTIONAL)
    moved = [x[:, order] for x in tokens]
    expected = block_statistics(*moved, 16, valid[:, order], needs=OPTIONAL)
    for field in expected.__slots__:
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


def test_steps_of_work_do_not_change_the_result(problems):
    tokens = problems.random_tokens(2, 150, 150, 2, 16)
    order = torch.arange(149, -1, -1)
    needs = frozenset(OPTIONAL)
    whole = block_statistics(*tokens, 16, order=order, needs=needs)
    parts = summarise(StatisticsCall(*tokens, 16, order=order, needs=needs, step_elements=1))
    for field in whole.__slots__:
        assert torch.equal(getattr(whole, field), getattr(parts, field)), field


def test_variance_survives_a_large_mean(problems):
    """E[x**2] - mean**2 in fp32 has no correct digit here."""
    query, key, value = (x + 4096.0 for x in problems.random_tokens(1, 64, 64, 1, 16))
    found = block_statistics(query, key, value, 16, needs=OPTIONAL)
    for tokens, variance in ((query, found.query_variance), (key, found.key_variance)):
        expected = reference.block_statistics(tokens, 16)[2]
        torch.testing.assert_close(variance.double(), expected, rtol=1e-4, atol=1e-6)
    expected = reference.block_statistics(value, 16)[2].sum(-1).sqrt()
    torch.testing.assert_close(found.value_deviation.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [16, 20, 128])
def test_equal_tokens_have_no_variance_at_all(problems, block):
    """Of 111 or 13 equal tokens of fp32, the mean is rounded."""
    tokens = [x[:, :1].expand(2, 111, 2, 24) for x in problems.random_tokens(2, 1, 1, 2, 24)]
    valid = torch.rand(2, 111, generator=torch.Generator().manual_seed(0)) < 0.7
    padded = [x.masked_fill(~valid[..., None, None], torch.nan) for x in tokens]
    for found in (
        block_statistics(*tokens, block, needs=OPTIONAL),
        block_statistics(*padded, block, valid, needs=OPTIONAL),
    ):
        for field in ("query_variance", "key_variance", "value_deviation"):
            assert (getattr(found, field) == 0).all(), field


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_has_no_finite_statistics(problems, wrong):
    tokens = problems.random_tokens(1, 40, 40, 2, 8)
    for part in tokens:
        part[0, 20, 1] = wrong
    found = block_statistics(*tokens, 16, needs=OPTIONAL)
    for field in ("query_mean", "key_mean", *OPTIONAL):
        is_finite = getattr(found, field).isfinite()
        assert not is_finite[0, 1, 1].any() and int(is_finite.sum()) == is_finite.numel() * 5 // 6


TOKENS = torch.zeros(2, 40, 2, 16)
BAD = {
    "rank": ({"query": TOKENS[0]}, ValueError, r"one shape \(B, N, H, D\)"),
    "key length": ({"key": TOKENS[:, :39]}, ValueError, "one shape"),
    "empty": (dict.fromkeys(("query", "key", "value"), TOKENS[:, :0]), ValueError, "empty"),
    "dtype mix": ({"key": TOKENS.half()}, TypeError, "one dtype"),
    "int": (dict.fromkeys(("query", "key", "value"), TOKENS.int()), TypeError, "fp32 and fp64"),
    "block": ({"block": 0}, ValueError, "at least 1"),
    "step": ({"step_elements": 0}, ValueError, "at least 1"),
    "float mask": ({"valid": torch.ones(2, 40)}, TypeError, "must be bool"),
    "mask shape": ({"valid": torch.ones(1, 40) > 0}, ValueError, "one row per sample"),
    "float order": ({"order": torch.arange(40.0)}, TypeError, "int32 or int64"),
    "order length": ({"order": torch.arange(39)}, ValueError, r"\(40,\)"),
    "name": ({"needs": frozenset({"key_mean", "value_mean"})}, ValueError, "got key_mean"),
    "device": ({"key": TOKENS.to("meta")}, ValueError, "device of query"),
    "backend": ({"backend": "cuda"}, ValueError, "'cpu' or 'triton'"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(change, error, message):
    arguments = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "block": 16}
    with pytest.raises(error, match=message):
        check(StatisticsCall(**(arguments | change)))


@pytest.mark.parametrize("order", [torch.zeros(40).long(), torch.arange(1, 41)], ids=["0", "1"])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="each of 0 to 39 once"):
        block_statistics(TOKENS, TOKENS, TOKENS, 16, order=order)


def test_the_function_checks_its_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        block_statistics(TOKENS, TOKENS, TOKENS, 0)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        block_statistics(TOKENS, TOKENS, TOKENS, 16, needs_keys=True)


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        check(StatisticsCall(TOKENS, TOKENS, TOKENS, 16, backend="triton"))


@pytest.mark.parametrize("has_everything", [False, True])
def test_opcheck(problems, has_everything):
    query, *rest = problems.random_tokens(2, 40, 40, 2, 16)
    rest += [torch.ones(2, 40) > 0, torch.arange(40)] if has_everything else [None, None]
    op = torch.ops.diffaccel.block_statistics.default
    torch.library.opcheck(op, (query, rest, [16, 1 << 20], [has_everything] * 6, False, "cpu"))


def test_compiles_without_a_graph_break(problems):
    tokens = problems.random_tokens(1, 40, 40, 2, 16)

    def run(query):
        found = block_statistics(query, *tokens[1:], 16)
        return found.query_mean * 2, found.counts

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(tokens[0]), run(tokens[0]), strict=True):
        assert torch.equal(found, expected)
