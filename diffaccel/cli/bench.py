"""`diffaccel bench kernels`: how fast the attention ops are here, against dense attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from diffaccel.benchmarks.ops.shapes import DENSITIES, SHAPES
from diffaccel.cli.options.argument_types import COUNT, POSITIVE, SHARE, usable_device
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.benchmarks.ops.run import Choice

DTYPES = ("fp32", "bf16", "fp16")
WHAT = Parameter(group=Group("What is measured", sort_key=1))
HOW = Parameter(group=Group("How", sort_key=2))
OUTPUT = Parameter(group=Group("Output", sort_key=3))
SEVERAL = Parameter(consume_multiple=(1, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """What is measured, and how.

    Attributes:
        densities: Shares of the key blocks, above 0 to 1 (default: 0.05 0.1 0.25 0.5 1).
        dtypes: Of fp32, bf16, fp16 (default: fp32 on a CPU, bf16 on CUDA).
        ops: Only these; a wrong name shows the list.
        block: Tokens per block (default: 128).
        heads: Instead of those of the model.
        flex_on_cpu: Compile flex_attention on a CPU too (needs a C++ compiler, takes minutes).
        device: cpu, cuda, cuda:1 (default: cuda where there is one).
        repetitions: Calls per row at most (default: 50).
        row_seconds: Time budget per row; a row has at least 3 calls (default: 2).
        time_limit: Seconds after which no more row is begun (default: none).
        tflops: State this ceiling, do not measure any.
        bandwidth: The other ceiling, with --tflops.
        seed: Of all random numbers (default: 0).
    """

    shapes: Annotated[
        tuple[str, ...],
        WHAT,
        SEVERAL,
        Parameter(
            metavar="NAME…",
            help=f"Token shapes: {', '.join(SHAPES)} (default: embedded-1k).",
        ),
    ] = ("embedded-1k",)
    densities: Annotated[tuple[float, ...], WHAT, SHARE, SEVERAL, Parameter(metavar="D…")] = (
        DENSITIES
    )
    dtypes: Annotated[tuple[str, ...], WHAT, SEVERAL, Parameter(metavar="NAME…")] = ()
    ops: Annotated[tuple[str, ...], WHAT, SEVERAL, Parameter(metavar="NAME…")] = ()
    block: Annotated[int, WHAT, Parameter(metavar="N")] = 128
    heads: Annotated[int | None, WHAT, COUNT, Parameter(metavar="H")] = None
    flex_on_cpu: Annotated[bool, WHAT] = False
    device: Annotated[str | None, HOW, Parameter(metavar="NAME")] = None
    repetitions: Annotated[int, HOW, COUNT] = 50
    row_seconds: Annotated[float, HOW, POSITIVE] = 2.0
    time_limit: Annotated[float | None, HOW, POSITIVE] = None
    tflops: Annotated[float | None, HOW, POSITIVE, Parameter(metavar="T")] = None
    bandwidth: Annotated[float | None, HOW, POSITIVE, Parameter(metavar="GB/S")] = None
    seed: Annotated[int, HOW, Parameter(metavar="S")] = 0


bench = App(name="bench", help="Measure what is fast here.")


@bench.command
def kernels(
    options: Annotated[KernelOptions, Parameter(name="*")] = KernelOptions(),
    *,
    roofline: Annotated[bool, OUTPUT] = False,
    csv: Annotated[Path | None, OUTPUT, Parameter(metavar="FILE")] = None,
    plot: Annotated[Path | None, OUTPUT, Parameter(metavar="FILE.png")] = None,
) -> int:
    """Time attention ops against dense backends.

    The ops of this package run in turns with the fastest dense backend. An op whose output breaks
    the error rule gets no speed. Prints Markdown.

    Args:
        roofline: Print only the least time of each kernel under the ceilings.
        csv: Also write all rows here.
        plot: Also draw TFLOP/s over density.
    """
    _check_outputs(csv, plot)
    choice = _choice(options)

    from diffaccel.benchmarks.ops.report import as_markdown
    from diffaccel.benchmarks.ops.roofline import roofline_table
    from diffaccel.benchmarks.ops.run import ceilings_of, facts_of, measure_kernels
    from diffaccel.progress import ProgressBars

    if roofline:
        ceilings = ceilings_of(choice)
        facts = facts_of(choice, ceilings)
        unused = {"inputs", "timing"}  # nothing but the ceilings is measured
        shown = {name: text for name, text in facts.items() if name not in unused}
        print(as_markdown([], shown), end="\n\n")
        print(roofline_table(choice.shapes, choice.densities, choice.block, ceilings))
        return 0
    with ProgressBars() as timing:
        result = measure_kernels(choice, timing, csv)
    print(as_markdown(result.rows, result.facts))
    if plot:
        from diffaccel.benchmarks.ops.plot import draw

        draw(plot, result.rows, result.facts)
    own = [row for row in result.rows if row.backend == "diffaccel"]
    return 1 if any(row.status.startswith("failed") for row in own) else 0


def _choice(options: KernelOptions) -> Choice:
    """Checks what can only be checked together or against the device."""
    _check_names(SHAPES, options.shapes, "--shapes")
    _check_names(DTYPES, options.dtypes, "--dtypes")
    shapes = tuple(SHAPES[name] for name in options.shapes)
    if options.heads:
        shapes = tuple(replace(shape, heads=options.heads) for shape in shapes)
    if (options.tflops is None) != (options.bandwidth is None):
        raise InputError(
            "--tflops and --bandwidth must be given together, got one of them; state both "
            "ceilings, or none to have both measured"
        )
    if options.block < 16 or options.block & (options.block - 1):
        raise InputError(
            f"--block must be a power of two of at least 16, got {options.block}; 128 suits "
            "most GPUs"
        )

    from diffaccel.benchmarks.ops.roofline import Ceilings
    from diffaccel.benchmarks.ops.run import OPS, Choice

    _check_names(OPS, options.ops, "--ops")
    device = _device(options.device)
    stated = None
    if options.tflops and options.bandwidth:
        stated = Ceilings(options.tflops, options.bandwidth)
    return Choice(
        shapes=shapes,
        densities=tuple(sorted(set(options.densities))),
        dtypes=options.dtypes or (("fp32",) if device == "cpu" else ("bf16",)),
        block=options.block,
        device=device,
        ops=options.ops or tuple(OPS),
        with_flex_on_cpu=options.flex_on_cpu,
        repetitions=options.repetitions,
        row_seconds=options.row_seconds,
        time_limit=options.time_limit,
        stated=stated,
        seed=options.seed,
    )


def _check_outputs(csv: Path | None, plot: Path | None) -> None:
    """Refuses paths that cannot be written, before any work is done."""
    if plot:
        if plot.suffix.lower() != ".png":
            raise InputError(f"--plot must end in .png, got {str(plot)!r}; rename it")
        if find_spec("matplotlib") is None:
            raise InputError(
                "--plot needs matplotlib, which is not installed; pip install 'diffaccel[bench]'"
            )
    for path in filter(None, (csv, plot)):
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(
                f"--csv and --plot must name a file in a folder that exists, got {str(path)!r}; "
                "create the folder or choose another"
            )


def _device(name: str | None) -> str:
    """Returns the device if it can be measured on."""
    if name is None:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or a CUDA device, got {name!r}; try --device cpu")
    return usable_device(name)


def _check_names(known: Collection[str], names: tuple[str, ...], option: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"{option} must be of {', '.join(known)}, got {name!r}; choose from these"
            )
