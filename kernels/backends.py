"""Where an op runs: Triton on CUDA, plain PyTorch on the CPU."""

import os

from torch import Tensor


def resolve_backend(backend: str | None, **tensors: Tensor | None) -> str:
    """Checks that all tensors share one device, and names the backend that runs there.

    Args:
        backend: "cpu", "triton", or None for the one that fits the device.
        **tensors: The arguments of the op by name, None where absent. The first sets the device.

    Returns:
        "cpu" or "triton".

    Raises:
        ValueError: If a device or the backend does not fit.
    """
    (first, anchor), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, tensor in others:
        if tensor.device != anchor.device:
            raise ValueError(
                f"all tensors must be on the device of {first}, got {first} on {anchor.device} "
                f"and {name} on {tensor.device}; move {name} with .to({first}.device)"
            )
    if backend not in (None, "cpu", "triton"):
        raise ValueError(f"backend must be None, 'cpu' or 'triton', got {backend=}; pass None")
    device = anchor.device.type
    if backend is None:
        backend = "triton" if device == "cuda" else "cpu"
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
    return backend
