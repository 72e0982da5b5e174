"""Compiles the block-sparse kernel for GPUs that need not be there; prints one JSON line each.

Runs in its own process: the interpreter variable is read when `@triton.jit` runs.
Usage: cross_compile_worker.py CAPABILITY HEAD_DIM [CAPABILITY HEAD_DIM ...]
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffaccel.kernels.block_sparse.kernel import block_sparse_fwd_kernel as kernel
from diffaccel.kernels.block_sparse.tiles import TileConfig, tile_configs

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_POINTERS = {
    "q_ptr": "*bf16",
    "k_ptr": "*bf16",
    "v_ptr": "*bf16",
    "o_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "tail_ptr": "*fp32",
    "indices_ptr": "*i32",
    "counts_ptr": "*i32",
    "key_mask_ptr": "*u8",
    "extra_k_ptr": "*bf16",
    "extra_v_ptr": "*bf16",
    "extra_mask_ptr": "*u8",
    "row_scale_ptr": "*fp32",
    "row_bias_ptr": "*fp32",
    "centroid_k_ptr": "*bf16",
    "centroid_v_ptr": "*bf16",
    "centroid_var_ptr": "*bf16",
    "centroid_bias_ptr": "*fp32",
    "listed_ptr": "*u8",
}


def compile_kernel(
    capability: int, head_dim: int, has_centroids: bool, config: TileConfig
) -> dict[str, object]:
    flags = {name: True for name in kernel.arg_names if name.startswith("HAS_")}
    flags.update(HAS_KEY_MASK=False, HAS_EXTRA_MASK=False)
    flags |= dict.fromkeys(("HAS_CENTROIDS", "HAS_VARIANCE", "HAS_TAIL"), has_centroids)
    constants = flags | {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": 128,
        "BLOCK_K": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "HAS_TMA": config.tma,
    }
    if not config.tma:
        constants |= {"k_desc": None, "v_desc": None}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_size = name not in _POINTERS and name != "scale_log2"
        signature[name] = _POINTERS.get(name, "i32" if is_size else "fp32")
        if name in constants:
            signature[name] = "constexpr"
        elif name in _POINTERS or re.fullmatch(r"stride_(q|k|v|ek|ev)[bnh]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in ("k_desc", "v_desc"):
            signature[name] = f"tensordesc<bf16[1, {config.block_n}, 1, {constants['BLOCK_D']}]>"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    facts = {
        "capability": capability,
        "head_dim": head_dim,
        "has_centroids": has_centroids,
        "tma": config.tma,
    }
    return facts | measured(compiled, capability)


def measured(compiled: object, capability: int) -> dict[str, int]:
    """What the machine code uses: shared memory, spills, matrix instructions."""
    sass = _disassemble(compiled.asm["cubin"])
    return {
        "shared": compiled.metadata.shared,
        "spill_bytes": _spill_bytes(compiled.asm["ptx"], capability),
        "matrix_ops": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)\b", sass)),
        "hopper_ops": len(re.findall(r"\bHGMMA\b", sass)),
        "blackwell_ops": len(re.findall(r"\bUTC\w*MMA\b", sass)),
        "copy_engine_ops": len(re.findall(r"\bUTMALDG\b", sass)),
    }


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(_TOOLS, "cuobjdump")
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout


def _spill_bytes(ptx: str, capability: int) -> int:
    """Asks the assembler that Triton itself uses for this target."""
    tool = os.path.join(_TOOLS, "ptxas" if capability < 90 else "ptxas-blackwell")
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    for capability, head_dim in zip(numbers[::2], numbers[1::2], strict=True):
        for config in tile_configs(128, 128, head_dim, 2, divmod(capability, 10)):
            for has_centroids in (False, True):
                row = compile_kernel(capability, head_dim, has_centroids, config)
                print(json.dumps(row), flush=True)
