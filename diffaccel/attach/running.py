"""Which pipeline and which thread are at work: those whose call leads to a model.

A model does not know its pipeline, and several may share it (`from_pipe`, copies, components
handed on). The call stack tells which one runs, and so whose scheduler and settings count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from threading import get_ident
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from diffaccel.errors import ModelError

PIPELINES = (DiffusionPipeline, ModularPipeline)
HOLDERS = ("self", "components")
"""Arguments that hold the pipeline, in the methods of pipelines and in the blocks of modular
ones."""

CALLS = ("__call__", "_call_impl")
"""Names of the functions that run a pipeline or a model."""


class Caller:
    """The thread that calls an attached model: steps, layouts and records are of one run.

    A run of a pipeline belongs to the thread that it began in until the pipeline is done.
    """

    def __init__(self) -> None:
        self._latest: int | None = None
        # Thread of the call that runs; setdefault and pop are atomic.
        self._present: dict[str, int] = {}
        self._depth = 0

    def __reduce__(self) -> tuple[type, tuple]:
        return Caller, ()  # nothing calls a copied model yet

    def enter(self, model: nn.Module) -> None:
        """Begins a call of the model; calls may be nested.

        Raises:
            ModelError: The model, or a pipeline that has begun with it, runs in another thread.
        """
        thread = get_ident()
        if self._present.setdefault("thread", thread) != thread:
            raise _busy(model)
        if self._latest != thread:
            frame = sys._current_frames().get(self._latest or 0)
            if _runs(frame, model):
                self._present.pop("thread")
                raise _busy(model)
            self._latest = thread
        self._depth += 1

    def leave(self) -> bool:
        """Ends a call, also one that failed; returns False where none has begun here."""
        if self._present.get("thread") != get_ident():
            return False
        self._depth -= 1
        if self._depth == 0:
            self._present.pop("thread")
        return True


def refuse_running(models: Iterable[nn.Module]) -> None:
    """Refuses to change what acts at denoisers that run in another thread.

    Raises:
        ModelError: One does, or a pipeline that holds it.
    """
    models, frames = tuple(models), sys._current_frames()
    del frames[get_ident()]  # a frame that knows itself is a reference cycle
    for frame in frames.values():
        for model in models:
            if _runs(frame, model):
                raise ModelError(
                    "methods and guidance are exchanged while a model does not run, and "
                    f"{type(model).__name__} runs in another thread; wait for it, or give each "
                    "thread a copy of the model"
                )


def running_pipeline(model: nn.Module) -> Any:
    """Returns the pipeline whose call leads to the current call of a model, None where none does.

    Args:
        model: A denoiser that is being called in this thread.
    """
    holders = (holder for _, holder in _holders(sys._getframe(1)))
    return next((x for x in holders if isinstance(x, PIPELINES) and _has(x, model)), None)


def _runs(frame: FrameType | None, model: nn.Module) -> bool:
    """Whether a call stack runs a model, or a pipeline that holds it."""
    return any(
        holder is model or (isinstance(holder, PIPELINES) and _has(holder, model))
        for name, holder in _holders(frame)
        if name in CALLS
    )


def _holders(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Yields each function of a call stack by name, with the objects that its arguments hold."""
    while frame is not None:
        code = frame.f_code
        for name in code.co_varnames[: min(code.co_argcount, 2)]:
            if name in HOLDERS:
                yield code.co_name, frame.f_locals.get(name)
        frame = frame.f_back


def _busy(model: nn.Module) -> ModelError:
    return ModelError(
        f"an attached model runs in one thread at a time, and {type(model).__name__} runs in "
        "another one; wait for it, or give each thread a copy of the model"
    )


def _has(pipe: Any, model: nn.Module) -> bool:
    return any(
        part is model or getattr(part, "_orig_mod", None) is model
        for part in vars(pipe).values()
        if isinstance(part, nn.Module)
    )
