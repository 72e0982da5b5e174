"""What two calls of a denoiser have in common is computed once.

A call whose first layers do the same as those of the call before need not compute them again.
Exact: the later layers get the very tensors that they would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffaccel.bindings import Binding
from diffaccel.bindings.exchange import exchanged
from diffaccel.guidance.perturb.blocks import pass_through


class SharedPrefix:
    """Records what the first stages of a denoiser return, and returns it again.

    Transformers hand everything on from block to block, so that the output of the last stage of
    the prefix suffices; a U-Net also hands skip connections from each stage to a later one.

    Args:
        model: The denoiser.
        binding: Of its family.
        length: Number of leading stages that do the same in both calls.
    """

    def __init__(self, model: nn.Module, binding: Binding, length: int) -> None:
        self._binding = binding
        stages = binding.stages(model)[:length]
        self.is_chain = binding.is_chain
        self.skipped = stages[:-1] if self.is_chain else ()
        self._outputs: dict[str, Any] = {}
        self.recording = False
        self._handles = [
            model.get_submodule(name).register_forward_hook(partial(self._record, name))
            for name in stages[len(self.skipped) :]
        ]
        self._expected = stages[len(self.skipped) :]

    @property
    def complete(self) -> bool:
        """Whether the recorded call went through the whole prefix (caches may skip blocks)."""
        return bool(self._expected) and set(self._outputs) == set(self._expected)

    def start(self) -> None:
        """Records the next call."""
        self._outputs = {}
        self.recording = True

    def stop(self) -> None:
        """Records no longer."""
        self.recording = False

    def forget(self) -> None:
        """Frees what was recorded."""
        self._outputs = {}
        self.recording = False

    def remove(self) -> None:
        """Takes the recording hooks off."""
        self.forget()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def replayed(self, model: nn.Module, rows: slice, count: int) -> Iterator[None]:
        """While active, the prefix returns what was recorded, for some of `count` samples."""
        with ExitStack() as stack:
            for name in self.skipped:
                block = model.get_submodule(name)
                stack.enter_context(
                    exchanged(block, "forward", pass_through(block, self._binding))
                )
            for name, output in self._outputs.items():
                again = _returning(_rows_of(output, rows, count))
                stack.enter_context(exchanged(model.get_submodule(name), "forward", again))
            yield

    def _record(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.recording:
            self._outputs[name] = _copied(output)


def _copied(output: Any) -> Any:
    """Copies what a stage returns: later ones may change it in place, as ControlNet-XS's do."""
    if isinstance(output, Tensor):
        return output.clone()
    return None if output is None else tuple(map(_copied, output))


def _rows_of(output: Any, rows: slice, count: int) -> Any:
    if output is None or rows == slice(None):
        return output
    if isinstance(output, Tensor):  # the frames of a sample may be rows, one after the other
        return output.unflatten(0, (count, -1))[rows].flatten(0, 1)
    return tuple(_rows_of(part, rows, count) for part in output)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
