"""Key padding that stays key padding where a stock processor writes it out for every pair."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KeyPadding(Tensor):
    """A bool mask of keys whose copies for all queries take no memory.

    HunyuanVideo 1.5 repeats the mask of the keys, (B, 1, 1, N), for N queries, and closes the rows
    of padding too: N x N bytes in every layer. What padding attends to is never read, so that the
    rows are left open.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Repeats without a copy; transposing and joining leave the mask as it is."""
        if func is Tensor.repeat:
            pairs = [*zip(args[0].shape, args[1:], strict=True)]
            if all(1 in pair for pair in pairs):
                return args[0].expand([size * count for size, count in pairs])
        if func in (Tensor.transpose, Tensor.__and__):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})

    @property
    def of_keys(self) -> Tensor:
        """The mask as a plain tensor, (B, 1, 1, N)."""
        return self.as_subclass(Tensor)[:, :, :1]
