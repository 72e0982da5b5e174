"""Which pipeline is at work: the one whose call leads to the current call of a model.

A model does not know its pipeline, and several may share it (`from_pipe`, copies, components
handed on). The call stack tells which one runs, and so whose scheduler and settings count.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

PIPELINES = (DiffusionPipeline, ModularPipeline)
HOLDERS = ("self", "components")
"""Arguments that hold the pipeline, in the methods of pipelines and in the blocks of modular
ones."""


def running_pipeline(model: nn.Module) -> Any:
    """Returns the pipeline whose call leads to the current call of a model, None where none does.

    Args:
        model: A denoiser that is being called in this thread.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 2)]:
            if name in HOLDERS:
                holder = frame.f_locals.get(name)
                if isinstance(holder, PIPELINES) and _has(holder, model):
                    return holder
        frame = frame.f_back
    return None


def _has(pipe: Any, model: nn.Module) -> bool:
    return any(
        part is model or getattr(part, "_orig_mod", None) is model
        for part in vars(pipe).values()
        if isinstance(part, nn.Module)
    )
