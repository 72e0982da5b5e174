"""Dense baselines: every SDPA backend that the device has, and packages that are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffaccel.benchmarks.ops.competitors.base import Op, Prepared, needs_cuda_package
from diffaccel.benchmarks.ops.error_rule import Expected
from diffaccel.benchmarks.ops.problems import Inputs, Problem

_SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
_SCORE_COPIES = 4  # that the math backend holds at once, fp32
_MEMORY_SHARE = 0.25  # of the memory that these copies may take


def _prepare_sdpa(backend: SDPBackend) -> Callable[[Problem, Inputs], Prepared]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return _prepared_by(lambda _problem: attend)


def _prepared_by(
    load: Callable[[Problem], Callable[[Tensor, Tensor, Tensor], Tensor]],
) -> Callable[[Problem, Inputs], Prepared]:
    """Wraps a function of heads-last query, key and value, found at use."""

    def prepare(problem: Problem, inputs: Inputs) -> Prepared:
        attend = load(problem)
        tokens = inputs.query, inputs.all_keys, inputs.all_values
        return Prepared(lambda: attend(*tokens), Expected(inputs), problem.shape.all_pairs)

    return prepare


def _reason_against_sdpa(backend: SDPBackend) -> Callable[[Problem], str | None]:
    def reason(problem: Problem) -> str | None:
        size = (1, 2, 128, problem.shape.dim)
        probe = torch.zeros(size, dtype=problem.dtype, device=problem.device)
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # why not, backend by backend
                scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            return "not on this device and dtype"
        if backend != SDPBackend.MATH:
            return None
        needed = _SCORE_COPIES * 4 * problem.shape.all_pairs
        if needed > _MEMORY_SHARE * device_memory(problem.device):
            return f"would hold {needed / 2**30:.0f} GiB of scores"
        return None

    return reason


def device_memory(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def _xformers(_problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def _flash_attn(_problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_attn_3(_problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn_interface import flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = flash_attn_func(query, key, value)
        return found[0] if isinstance(found, tuple) else found  # early versions add the lse

    return attend


def _sageattention(_problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sageattention import sageattn

    return lambda query, key, value: sageattn(query, key, value, tensor_layout="NHD")


_PACKAGES = {
    "xformers": ("xformers", _xformers),
    "flash-attn": ("flash_attn", _flash_attn),
    "flash-attn-3": ("flash_attn_interface", _flash_attn_3),
    "sageattention": ("sageattention", _sageattention),
}

DENSE_OPS: dict[str, Op] = {
    name: Op("dense", name, _prepare_sdpa(backend), _reason_against_sdpa(backend), is_dense=True)
    for name, backend in _SDPA.items()
} | {
    name: Op("dense", name, _prepared_by(load), needs_cuda_package(package), is_dense=True)
    for name, (package, load) in _PACKAGES.items()
}
