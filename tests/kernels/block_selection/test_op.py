"""Block selection: the CPU path against the rule in exact fractions, and argument checks."""

import pytest
import torch

from diffaccel.kernels import SelectionCall, reference, select_blocks
from diffaccel.kernels.block_selection.call import check
from diffaccel.kernels.block_selection.op import select


@pytest.mark.drawn(150)
def test_drawn_problems_match_the_oracle(problems, seed):
    problem = problems.selection_problem(seed)
    call = SelectionCall(**problem, return_kept=True)
    check(call)
    problems.check_selection(select(call), problem, reference.select_blocks)


def test_lists_may_be_as_narrow_as_the_longest_row():
    scores = torch.tensor([[0.1, 0.4, 0.0, 0.5], [0.7, 0.1, 0.1, 0.1]])[None, None]
    forced = torch.tensor([[False, False, True, False], [False, False, True, False]])
    indices, counts = select_blocks(scores, 1, forced=forced, max_count=2)
    assert counts.tolist() == [[[1, 2]]]
    assert indices.tolist() == [[[[3, 0], [0, 2]]]]
    with pytest.raises(ValueError, match="max_count must be at least the blocks"):
        select_blocks(scores, 1, forced=forced, max_count=1)


def test_heads_have_budgets_of_their_own():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(1, 3, 2, 4)
    budgets = torch.tensor([[1, 3, 9]], dtype=torch.int32)
    indices, counts = select(SelectionCall(scores, 3, budgets=budgets))
    assert counts.tolist() == [[[1, 1], [3, 3], [3, 3]]]
    assert indices.shape[-1] == 3 and indices[0, 1, 0].tolist() == [0, 1, 2]


def test_width_follows_the_configuration_alone():
    scores = torch.rand(1, 1, 3, 8)
    assert select_blocks(scores, 3)[0].shape[-1] == 3
    assert select_blocks(scores, 3, p_remain=0.1)[0].shape[-1] == 8
    assert select_blocks(scores, 3, forced=torch.eye(3, 8) > 0)[0].shape[-1] == 8


SCORES = torch.full((2, 2, 3, 8), 0.125)
BAD = {
    "rank": ({"scores": SCORES[0]}, ValueError, r"\(B, H, R, NB\)"),
    "empty": ({"scores": SCORES[:, :, :0]}, ValueError, "not empty"),
    "half": ({"scores": SCORES.half()}, TypeError, "fp32"),
    "top_k": ({"top_k": 0}, ValueError, "1 to NB=8"),
    "large top_k": ({"top_k": 9}, ValueError, "1 to NB=8"),
    "p_remain": ({"p_remain": 1.5}, ValueError, "p_remain must lie in 0 to 1"),
    "p_remain nan": ({"p_remain": float("nan")}, ValueError, "p_remain must lie in 0 to 1"),
    "text dtype": ({"text": SCORES[..., 0].half()}, TypeError, "text must be fp32"),
    "text shape": ({"text": SCORES}, ValueError, r"\(2, 2, 3\)"),
    "forced dtype": ({"forced": torch.ones(3, 8)}, TypeError, "forced must be bool"),
    "forced shape": ({"forced": torch.ones(8, 8) > 0}, ValueError, r"\(3, 8\)"),
    "budgets dtype": ({"budgets": torch.ones(2, 2)}, TypeError, "budgets must be int32"),
    "budgets shape": ({"budgets": torch.ones(2).int()}, ValueError, r"\(2, 2\) or \(1, H\)"),
    "max_count": ({"max_count": 9}, ValueError, "max_count must lie in 1 to NB=8"),
    "device": ({"text": SCORES[..., 0].to("meta")}, ValueError, "device of scores"),
    "backend": ({"backend": "cuda"}, ValueError, "'cpu' or 'triton'"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        check(SelectionCall(**({"scores": SCORES, "top_k": 2} | change)))


def test_the_function_checks_its_arguments():
    with pytest.raises(ValueError, match="1 to NB=8"):
        select_blocks(SCORES, 9)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        select_blocks(SCORES, 2, top_p=0.5)


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        check(SelectionCall(SCORES, 2, backend="triton"))


@pytest.mark.parametrize("has_everything", [False, True])
def test_opcheck(has_everything):
    scores = torch.rand(2, 2, 3, 9)
    budgets = torch.ones(2, 2, dtype=torch.int32)
    rest = [scores[..., -1], torch.eye(3, 8) > 0, budgets] if has_everything else [None] * 3
    op = torch.ops.diffaccel.select_blocks.default
    torch.library.opcheck(op, (scores[..., :-1], rest, [2, 8], 0.3, has_everything, "cpu"))


def test_compiles_without_a_graph_break():
    def run(scores):
        indices, counts = select_blocks(scores, 2, p_remain=0.3)
        return indices + 1, counts

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(SCORES), run(SCORES), strict=True):
        assert torch.equal(found, expected)
