"""Checks Sol-Attn as it is here against the eager reference of comfy-kitchen, on captured calls.

    pip install --no-deps comfy-kitchen
    python benchmarks/studies/block_sparse/reference.py --captures captures

The visual tokens alone, since the reference has no exact text, in raster order. Channels are
padded with zeros to the 128 that it takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.benchmarks.studies.block_sparse.captures import DRAWINGS, Captured, captured
from diffaccel.benchmarks.studies.block_sparse.layers import attended
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.sol import SolAttn

CHANNELS, BLOCK = 128, 64
TAU, KEPT_BLOCKS = 1.0, 6


def without_text(call: Captured) -> Captured:
    """The same call with its visual tokens alone."""
    part, layout = call.layout.visual_slice, TokenLayout.video(*call.layout.grid)
    tokens = (x[:, part].contiguous() for x in (call.query, call.key, call.value))
    query, key, value = tokens
    return replace(call, query=query, key=key, value=value, layout=layout)


def reference(call: Captured, **rule: Any) -> Tensor:
    """What comfy-kitchen's eager `sol_attn` answers: (B, N, H, D)."""
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    dim = call.query.shape[-1]
    tokens = (F.pad(x.float(), (0, CHANNELS - dim)) for x in (call.query, call.key, call.value))
    return sol_attn(*tokens, scale=call.scale, **rule)[..., :dim]


def deviations(call: Captured) -> dict[str, tuple[float, float]]:
    """The largest and the relative difference of the two, by tau and by top-k."""
    call = without_text(call)
    blocks = -(-call.query.shape[1] // BLOCK)
    keep = KEPT_BLOCKS / blocks
    found = {}
    for name, method, rule in (
        ("tau", SolAttn(TAU), {"tau": TAU}),
        ("top-k", SolAttn(keep=keep), {"topk_ratio": keep}),
    ):
        own, other = attended(method, call)[0], reference(call, **rule)
        difference = own - other
        found[name] = (float(difference.abs().max()), float(difference.norm() / other.norm()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the differences of one call of each drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captures", type=Path, default=Path("captures"), help="kept here")
    parser.add_argument("--drawings", default="", help="only those with this in their label")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        for drawing in DRAWINGS:
            if options.drawings in drawing.label:
                call = captured(drawing, options.captures)[-1]
                for name, (largest, relative) in deviations(call).items():
                    print(f"{drawing.label} {name}: max {largest:.1e}, relative {relative:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
