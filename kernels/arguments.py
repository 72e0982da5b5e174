"""What the arguments of ops look like: types that `torch.library` reads, and shared checks."""

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# torch 2.6 reads these forms in the signature of a custom op, and not those of collections.abc.
Tensors = typing.Sequence[typing.Optional[Tensor]]  # noqa: UP006, UP045
Numbers = typing.Sequence[int]  # noqa: UP006
Flags = typing.Sequence[bool]  # noqa: UP006

MASK = "one row per sample, True = attended"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tokens(
    op: str, query: Tensor, key: Tensor, value: Tensor, *, fits: bool, rule: str, remedy: str
) -> None:
    """Checks what all ops ask of their tokens.

    Args:
        op: Name of the op, for the message.
        query: The tokens; none may be empty, and all share one dtype of fp16, bf16, fp32 and fp64.
        key: As query.
        value: As query.
        fits: Whether the shapes follow the rule of the op.
        rule: That rule, for the message.
        remedy: What to do about shapes that break it.

    Raises:
        ValueError: If the shapes do not fit or are empty.
        TypeError: If a dtype does not fit.
    """
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if not fits:
        raise ValueError(f"{op}: {rule}, got {shapes}; {remedy}")
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(
            f"{op}: query, key and value must not be empty, got {shapes}; skip the call when "
            "there is nothing to attend"
        )
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query, key and value must share one dtype of fp16, bf16, fp32 and fp64, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; cast them to one dtype"
        )


def refuse_backward(op: str) -> Callable[..., Any]:
    """Returns the backward of an op that has none, for `register_autograd`."""

    def backward(*_: Any) -> Any:
        raise RuntimeError(
            f"{op} is for inference and has no backward; call it under torch.no_grad(), or use "
            "diffaccel.kernels.dense_attention where gradients are needed"
        )

    return backward


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype in which a CPU computes with tokens: fp64 for fp64, else fp32."""
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], meaning: str
) -> None:
    """Raises TypeError or ValueError unless an optional tensor has this dtype and shape."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        kind = str(dtype).removeprefix("torch.").replace("float32", "fp32")
        raise TypeError(f"{name} must be {kind}, {meaning}, got {tensor.dtype}; convert it")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, {meaning}, got {tuple(tensor.shape)}")


def check_extra(
    key: Tensor,
    value: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_padding_mask: Tensor | None,
) -> None:
    """Checks keys that every query attends: batch, heads, head dim and dtype of key and value.

    Raises:
        ValueError: If one of them is missing or has another shape.
        TypeError: If a dtype does not fit.
    """
    if extra_key is None and extra_value is None and extra_padding_mask is None:
        return
    if extra_key is None or extra_value is None:
        raise ValueError(
            "extra_key and extra_value go together, and extra_padding_mask needs them, got "
            f"{extra_key is not None=}, {extra_value is not None=}; pass both or none"
        )
    count = extra_key.shape[1] if extra_key.dim() == 4 else -1
    for name, extra, like in (("extra_key", extra_key, key), ("extra_value", extra_value, value)):
        shape = (len(like), count, *like.shape[-2:])
        if tuple(extra.shape) != shape:
            raise ValueError(
                f"{name} must be (B, E, H, D) with the batch, heads and head dim of "
                f"{name.removeprefix('extra_')} {tuple(like.shape)}, got {tuple(extra.shape)}; "
                "pass the text keys of the same heads"
            )
        if extra.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the dtype of query {like.dtype}, got {extra.dtype}; cast it"
            )
    check_tensor("extra_padding_mask", extra_padding_mask, torch.bool, (len(key), count), MASK)
