"""Compiles the neighborhood kernel for GPUs that need not be there; prints one JSON line each.

Runs in its own process: the interpreter variable is read when `@triton.jit` runs.
Usage: neighborhood_compile_worker.py CAPABILITY HEAD_DIM [CAPABILITY HEAD_DIM ...]
"""

import json
import re
import sys

import triton
from cross_compile_worker import measured
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffaccel.kernels.neighborhood.kernel import neighborhood_fwd_kernel as kernel
from diffaccel.kernels.neighborhood.launch import box_config
from diffaccel.kernels.neighborhood.windows import Axis

WINDOW = (Axis(1, 1), Axis(256, 80, 16), Axis(256, 80, 16))
POINTERS = {
    "q_ptr": "*bf16",
    "k_ptr": "*bf16",
    "v_ptr": "*bf16",
    "o_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "extra_k_ptr": "*bf16",
    "extra_v_ptr": "*bf16",
    "extra_mask_ptr": "*u8",
}


def compile_kernel(capability: int, head_dim: int) -> dict[str, object]:
    config = box_config(WINDOW, head_dim, 2, divmod(capability, 10))
    constants = {f"{side}{i}": box[i] for side, box in (("Q", config.query), ("K", config.key))
                 for i in range(3)}  # fmt: skip
    constants |= {f"{name}{i}": False for name in ("CAUSAL", "TRUNCATED") for i in range(3)}
    constants |= {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_EXTRA": True,
        "HAS_EXTRA_MASK": False,
        "HAS_LSE": True,
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = POINTERS.get(name, "fp32" if name == "scale_log2" else "i32")
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS or re.fullmatch(r"stride_(q|k|v|ek|ev)[bn012h]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    facts = {"capability": capability, "head_dim": head_dim, "config": str(config)}
    return facts | measured(compiled, capability)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    for capability, head_dim in zip(numbers[::2], numbers[1::2], strict=True):
        print(json.dumps(compile_kernel(capability, head_dim)), flush=True)
