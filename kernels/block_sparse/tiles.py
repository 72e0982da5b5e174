"""How the block-sparse kernel may be launched on a GPU: tiles, warps, stages, ways to load."""

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One launch: tiles of queries, keys and centroids, warps, stages, and who loads keys.

    With `tma` the copy engine of Hopper and later GPUs loads whole tiles through tensor
    descriptors; without, the threads do through pointers.
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    tma: bool = False


def tile_configs(
    block_q: int, block_k: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> tuple[TileConfig, ...]:
    """Lists the launches worth trying, of which the first runs everywhere.

    None spills registers inside its loop over keys or overflows shared memory, as compiled by
    Triton 3.9. Its automatic warp specialization is not among them: it leaves a loop that
    follows a list unchanged for sm_90 and fails to compile it for sm_100.

    Args:
        block_q: Queries per block of the lists; the tile may be smaller.
        block_k: Keys per block of the lists; the tile may be smaller.
        head_dim: Head dim D, 1 to 256.
        element_size: Bytes per element, 2 or 4.
        capability: CUDA compute capability, (9, 0) for Hopper.
    """
    plain = _plain_config(block_q, block_k, head_dim, element_size, capability)
    # tiles that do not fill their blocks run masked, through pointers in any case; a head dim that
    # is no power of two would have descriptors reach beyond each row
    is_whole = block_k % plain.block_n == 0 and triton.next_power_of_2(head_dim) == head_dim
    if capability < (9, 0) or element_size != 2 or not is_whole:
        return (plain,)
    return plain, replace(plain, tma=True)


def _plain_config(
    block_q: int, block_k: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> TileConfig:
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    is_datacenter = capability in ((9, 0), (10, 0), (10, 3))
    stages = 2
    if element_size == 4:
        most_m, most_n = (64, 32) if padded_dim <= 128 else (32, 16)
    elif padded_dim > 128:
        most_m, most_n = (128, 64) if is_datacenter else (64, 32)
    elif capability == (9, 0) and padded_dim <= 64:
        most_m, most_n = 128, 128
    elif is_datacenter:  # 128 keys spill 296 bytes on sm_90 and 1304 on sm_100, 64 none
        most_m, most_n, stages = 128, 64, 3
    elif capability == (8, 0):
        most_m, most_n = 128, 64
    else:  # 64 x 64 spill 192 bytes on sm_89 at 128 dims, 128 x 32 none
        most_m, most_n = (128, 32) if padded_dim > 64 else (64, 64)
    block_m = min(most_m, max(16, triton.next_power_of_2(block_q)))
    block_n = min(most_n, max(16, triton.next_power_of_2(block_k)))
    warps = 8 if block_m >= 128 else 4
    return TileConfig(block_m, block_n, min(block_n, 32), num_warps=warps, num_stages=stages)


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether the copy engine can address a tensor: base and strides in steps of 16 bytes."""
    steps = (tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:-1]))
    return tensor.numel() > 0 and tensor.stride(-1) == 1 and not any(s % 16 for s in steps)


@functools.lru_cache(maxsize=64)
def device_capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability; the interpreter, which has none, counts as (8, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
