"""Block statistics and selection on a real GPU: bf16, real sizes, no host synchronisation."""

import pytest
import torch

from diffaccel.kernels import SelectionCall, block_statistics, reference, select_blocks
from diffaccel.kernels.block_selection.op import select
from diffaccel.kernels.block_statistics.call import OPTIONAL

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.drawn(40)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_drawn_statistics_match_the_oracle(problems, poisoned_empty, dtype, seed):
    problem = problems.summary_problem(seed, dtype, device="cuda")
    found = block_statistics(**problem)
    problems.check_summary(found, problem, reference.block_statistics)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dim,block", [(64, 128), (72, 64), (128, 128), (256, 128), (128, 2048)])
def test_statistics_of_a_large_picture_match_the_cpu(problems, dtype, dim, block):
    tokens = problems.random_tokens(1, 4500, 4500, 3, dim, dtype, device="cuda")
    order = torch.randperm(4500, device="cuda")
    found = block_statistics(*tokens, block, order=order, needs=OPTIONAL)
    cpu = [x.cpu() for x in tokens]
    expected = block_statistics(*cpu, block, order=order.cpu(), needs=OPTIONAL)
    for field in expected.__slots__:
        torch.testing.assert_close(
            getattr(found, field).cpu(), getattr(expected, field), atol=1e-5, rtol=1e-5
        )


@pytest.mark.drawn(150)
def test_drawn_selections_match_the_oracle(problems, seed):
    problem = problems.selection_problem(seed, device="cuda")
    found = select(SelectionCall(**problem, return_kept=True))
    problems.check_selection(found, problem, reference.select_blocks)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("blocks", [900, 4096, 5000])
def test_long_rows_match_the_oracle(problems, blocks, seed):
    problem = problems.selection_problem(seed, device="cuda", blocks=blocks)
    found = select(SelectionCall(**problem, return_kept=True))
    problems.check_selection(found, problem, reference.select_blocks)


def test_no_host_synchronisation(problems):
    tokens = problems.random_tokens(1, 300, 300, 2, 64, device="cuda")
    order, scores = torch.randperm(300, device="cuda"), torch.rand(1, 2, 3, 9, device="cuda")
    forced = torch.eye(3, 9, device="cuda") > 0

    def run():
        block_statistics(*tokens, 64, order=order)
        select_blocks(scores, 2, p_remain=0.3, forced=forced)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
