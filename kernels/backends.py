"""Where an op runs: Triton on CUDA, plain PyTorch elsewhere."""

import os
from collections.abc import Mapping

from torch import Tensor


def check_backend(
    backend: str | None, tensors: Mapping[str, Tensor | None], plain: str = "cpu"
) -> None:
    """Checks that all tensors share one device, and that the backend runs there.

    Args:
        backend: "triton", `plain`, or None for the one that fits the device.
        tensors: The arguments of the op by name, None where absent; the first sets the device.
        plain: Name of the backend in plain PyTorch: "cpu", or another one for any device.

    Raises:
        ValueError: If a device or the backend does not fit.
    """
    first, anchor = next(iter(tensors.items()))
    if anchor is None:
        raise TypeError(f"{first} must be a tensor, got None")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"all tensors must be on one device, the device of {first}, got {first} on "
                f"{anchor.device} and {name} on {tensor.device}; move {name} with "
                f".to({first}.device)"
            )
    if backend not in (None, plain, "triton"):
        raise ValueError(f"backend must be None, {plain!r} or 'triton', got {backend=}; pass None")
    device = anchor.device.type
    if backend is None:
        backend = "triton" if device == "cuda" else plain
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and device != "cuda" and not is_interpreted:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got {first} on {anchor.device}; "
            "pass backend=None, or set TRITON_INTERPRET=1 before the first import to debug"
        )
    if backend == "cpu" and device not in ("cpu", "meta"):  # meta asks for shapes alone
        raise ValueError(
            f"backend 'cpu' needs CPU tensors, got {first} on {anchor.device}; pass backend=None"
        )
