"""One of two processes that share a Wan model by Ulysses; compares with the whole model.

Usage: python ulysses_ranks.py RANK MEETING_FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
RANK, MEETING = int(sys.argv[1]), sys.argv[2]
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE="2")
sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import tiny_pipelines  # noqa: E402
import torch  # noqa: E402
from diffusers import ContextParallelConfig  # noqa: E402

from diffaccel.attach.attachment import set_attn_processor  # noqa: E402
from diffaccel.methods import SparseAttn  # noqa: E402

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 16, 3, 8, 8, generator=generator)
    text = torch.randn(1, 16, 32, generator=generator)
    return model(hidden_states, torch.tensor([500.0]), text, return_dict=False)[0]


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{MEETING}", rank=RANK, world_size=2
    )
    # diffusers counts accelerators before it counts processes.
    torch.accelerator.device_count = lambda: 2
    whole, before, after = (tiny_pipelines.wan21().pipe.transformer for _ in range(3))
    stock = output(whole)
    set_attn_processor(whole, METHOD)
    expected = output(whole)
    assert not torch.equal(stock, expected)

    attachment = set_attn_processor(before, METHOD)
    before.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    after.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    set_attn_processor(after, METHOD)
    assert torch.equal(output(before), expected)
    assert torch.equal(output(after), expected)
    assert all(layer.sparse_calls == 1 for layer in attachment.report().layers)
    attachment.remove()
    assert torch.equal(output(before), stock)


with torch.no_grad():
    main()
torch.distributed.barrier()
# the groups that diffusers made keep threads, at whose end the interpreter aborts now and then
os._exit(0)
