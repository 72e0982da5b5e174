"""Spreads work that fits on one processor core over all of them."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


def in_processes(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """Calls a function of a module with each tuple of arguments, in processes of one thread.

    There are as many processes as PyTorch has threads here.
    """
    if not calls:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        torch.get_num_threads(), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        tasks = [pool.submit(function, *arguments) for arguments in calls]
        for done, task in enumerate(as_completed(tasks), 1):
            task.result()
            print(f"{function.__name__} {done} of {len(tasks)}", flush=True)
