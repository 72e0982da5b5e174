"""Compiles block statistics and selection for GPUs that need not be there; prints JSON lines.

Runs in its own process: the interpreter variable is read when `@triton.jit` runs.
Usage: block_ops_compile_worker.py OP CAPABILITY SIZE [OP CAPABILITY SIZE ...] where OP is
statistics, SIZE the head dim, or selection, SIZE the number of blocks.
"""

import json
import re
import sys

import triton
from cross_compile_worker import measured
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffaccel.kernels.block_selection.kernel import select_blocks_kernel
from diffaccel.kernels.block_selection.launch import row_warps, row_width
from diffaccel.kernels.block_statistics.kernel import block_statistics_kernel
from diffaccel.kernels.block_statistics.launch import tile_config

POINTERS = {
    "q_ptr": "*bf16",
    "k_ptr": "*bf16",
    "v_ptr": "*bf16",
    "valid_ptr": "*u8",
    "order_ptr": "*i64",
    "forced_ptr": "*u8",
    "budgets_ptr": "*i32",
    "indices_ptr": "*i32",
    "kept_ptr": "*u8",
}


def statistics_launch(head_dim: int) -> tuple[object, dict[str, object], int]:
    tile = tile_config(128, 1 << 16, head_dim)
    constants = {"HEAD_DIM": head_dim, "BLOCK": 128, "BLOCK_N": tile.block_n,
                 "BLOCK_D": tile.block_d}  # fmt: skip
    return block_statistics_kernel, constants, tile.num_warps


def selection_launch(blocks: int) -> tuple[object, dict[str, object], int]:
    return select_blocks_kernel, {"BLOCK": row_width(blocks)}, row_warps(blocks)


def compile_kernel(op: str, capability: int, size: int) -> dict[str, object]:
    kernel, constants, warps = {
        "statistics": statistics_launch,
        "selection": selection_launch,
    }[op](size)
    constants |= {name: True for name in kernel.arg_names if name.startswith("HAS_")}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "fp32" if name == "p_remain" else "i32"
        signature[name] = POINTERS.get(name, default)
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or re.fullmatch(r"stride_[qkv][bnh]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    facts = {"op": op, "capability": capability, "size": size, "num_warps": warps}
    return facts | measured(compiled, capability)


if __name__ == "__main__":
    for op, capability, size in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        print(json.dumps(compile_kernel(op, int(capability), int(size))), flush=True)
