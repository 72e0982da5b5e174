"""Trains one model in several processes of one thread each, which average their gradients.

Models of many small operations keep one core busy but not two: there two replicas take twice as
many samples a second as two threads do.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def replicate(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function of a module once per thread of PyTorch, in that many processes at once.

    The caller's process is the first of them. Within the function `rank` tells them apart.
    """
    count = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        others = [
            context.Process(target=_join, args=(meeting, number, count, function, arguments))
            for number in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            _join(meeting, 0, count, function, arguments)
        finally:
            torch.set_num_threads(count)
            for process in others:
                process.join(timeout=60)
                process.kill()


def rank() -> int:
    """Number of this process among its replicas, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_over_replicas(model: nn.Module, spent_s: float) -> float:
    """Averages gradients, and the time spent, which replicas must agree on to stop together."""
    if not dist.is_initialized():
        return spent_s
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([torch.tensor([spent_s]), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat[1:].split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[0].item()


def _join(
    meeting: Path, number: int, count: int, function: Callable[..., None], arguments: tuple
) -> None:
    """Runs the function as one of the replicas."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=count)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
