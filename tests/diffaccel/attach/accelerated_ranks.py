"""One of several processes of accelerate; each makes the pictures of its prompts.

Usage: torchrun --standalone --nproc_per_node 2 accelerated_ranks.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import tiny_pipelines  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402

import diffaccel  # noqa: E402

torch.set_num_threads(1)
state = PartialState(cpu=True)
tiny = tiny_pipelines.flux()
tiny.pipe.to(state.device)
method = diffaccel.SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
tiny.pipe.set_attn_processor(method, always=True)
with state.split_between_processes([1, 2, 3]) as seeds:
    for seed in seeds:
        picture = tiny.sample(seed=seed)
        torch.save((state.process_index, picture), Path(sys.argv[1]) / f"{seed}.pt")
state.wait_for_everyone()
state.destroy_process_group()
