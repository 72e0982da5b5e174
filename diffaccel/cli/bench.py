"""`diffaccel bench kernels`: how fast the attention ops are here, against dense attention."""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from diffaccel.benchmarks.ops.shapes import DENSITIES, SHAPES
from diffaccel.cli.options.argument_types import at_least
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.benchmarks.ops.run import Choice

DTYPES = ("fp32", "bf16", "fp16")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    bench = commands.add_parser("bench", help="measure", description="Measures what is fast here.")
    kinds = bench.add_subparsers(title="benchmarks", dest="benchmark", required=True)
    parser = kinds.add_parser(
        "kernels",
        help="attention ops against dense backends",
        description="Times the attention ops of this package in turns with the fastest dense "
        "backend. An op whose output breaks the error rule gets no speed. Prints Markdown.",
    )
    _add_what(parser)
    _add_how(parser)
    _add_outputs(parser)
    parser.set_defaults(execute=execute)


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["embedded-1k"],
        metavar="NAME",
        help=f"token shapes: {', '.join(SHAPES)} (default: embedded-1k)",
    )
    parser.add_argument(
        "--densities",
        nargs="+",
        type=_density,
        default=list(DENSITIES),
        metavar="D",
        help="shares of the key blocks, above 0 to 1 (default: all of "
        f"{', '.join(f'{d:g}' for d in DENSITIES)})",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(DTYPES)} (default: fp32 on a CPU, bf16 on CUDA)",
    )
    parser.add_argument(
        "--ops", nargs="+", metavar="NAME", help="only these; a wrong name shows the list"
    )
    parser.add_argument(
        "--block", type=int, default=128, metavar="N", help="tokens per block (default: 128)"
    )
    parser.add_argument(
        "--heads", type=at_least(1), metavar="H", help="instead of those of the model"
    )
    parser.add_argument(
        "--flex-on-cpu",
        action="store_true",
        help="compile flex_attention on a CPU too (needs a C++ compiler, takes minutes)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)"
    )
    parser.add_argument(
        "--repetitions",
        type=at_least(1),
        default=50,
        metavar="N",
        help="calls per row at most (default: 50)",
    )
    parser.add_argument(
        "--row-seconds",
        type=_positive,
        default=2.0,
        metavar="S",
        help="time budget per row; a row has at least 3 calls (default: 2)",
    )
    parser.add_argument(
        "--time-limit",
        type=_positive,
        metavar="S",
        help="seconds after which no more row is begun (default: none)",
    )
    parser.add_argument(
        "--tflops", type=_positive, metavar="T", help="state this ceiling, do not measure any"
    )
    parser.add_argument(
        "--bandwidth", type=_positive, metavar="GB/S", help="the other ceiling, with --tflops"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="print only the least time of each kernel under the ceilings",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all rows here")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw TFLOP/s over density"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Checks the arguments, then measures, writes and prints."""
    _check_outputs(arguments)
    choice = _choice(arguments)

    from diffaccel.benchmarks.ops.report import as_markdown
    from diffaccel.benchmarks.ops.roofline import roofline_table
    from diffaccel.benchmarks.ops.run import ceilings_of, facts_of, measure_kernels
    from diffaccel.progress import ProgressBars

    if arguments.roofline:
        ceilings = ceilings_of(choice)
        facts = facts_of(choice, ceilings)
        unused = {"inputs", "timing"}  # nothing but the ceilings is measured
        shown = {name: text for name, text in facts.items() if name not in unused}
        print(as_markdown([], shown), end="\n\n")
        print(roofline_table(choice.shapes, choice.densities, choice.block, ceilings))
        return 0
    with ProgressBars() as timing:
        result = measure_kernels(choice, timing, arguments.csv)
    print(as_markdown(result.rows, result.facts))
    if arguments.plot:
        from diffaccel.benchmarks.ops.plot import draw

        draw(arguments.plot, result.rows, result.facts)
    own = [row for row in result.rows if row.backend == "diffaccel"]
    return 1 if any(row.status.startswith("failed") for row in own) else 0


def _choice(arguments: argparse.Namespace) -> Choice:
    """Checks what can only be checked together or against the device."""
    shapes = tuple(_named(SHAPES, name, "--shapes") for name in arguments.shapes)
    if arguments.heads:
        shapes = tuple(replace(shape, heads=arguments.heads) for shape in shapes)
    if (arguments.tflops is None) != (arguments.bandwidth is None):
        raise InputError(
            "--tflops and --bandwidth must be given together, got one of them; state both "
            "ceilings, or none to have both measured"
        )
    if arguments.block < 16 or arguments.block & (arguments.block - 1):
        raise InputError(
            f"--block must be a power of two of at least 16, got {arguments.block}; 128 suits "
            "most GPUs"
        )

    from diffaccel.benchmarks.ops.roofline import Ceilings
    from diffaccel.benchmarks.ops.run import OPS, Choice

    for name in arguments.ops or ():
        _named(OPS, name, "--ops")
    for name in arguments.dtypes or ():
        _named(dict.fromkeys(DTYPES, name), name, "--dtypes")
    device = _device(arguments.device)
    stated = Ceilings(arguments.tflops, arguments.bandwidth) if arguments.tflops else None
    return Choice(
        shapes=shapes,
        densities=tuple(sorted(set(arguments.densities))),
        dtypes=tuple(arguments.dtypes or (["fp32"] if device == "cpu" else ["bf16"])),
        block=arguments.block,
        device=device,
        ops=tuple(arguments.ops or OPS),
        with_flex_on_cpu=arguments.flex_on_cpu,
        repetitions=arguments.repetitions,
        row_seconds=arguments.row_seconds,
        time_limit=arguments.time_limit,
        stated=stated,
        seed=arguments.seed,
    )


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses paths that cannot be written, before any work is done."""
    if arguments.plot:
        if arguments.plot.suffix.lower() != ".png":
            raise InputError(f"--plot must end in .png, got {str(arguments.plot)!r}; rename it")
        if find_spec("matplotlib") is None:
            raise InputError(
                "--plot needs matplotlib, which is not installed; pip install 'diffaccel[bench]'"
            )
    for path in filter(None, (arguments.csv, arguments.plot)):
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(
                f"--csv and --plot must name a file in a folder that exists, got {str(path)!r}; "
                "create the folder or choose another"
            )


def _device(name: str | None) -> str:
    """Returns the device if it can be measured on."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or a CUDA device, got {name!r}; try --device cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device must be usable by PyTorch, got {name!r} ({str(error).splitlines()[0]}); "
            "try --device cpu"
        ) from error
    return name


def _named(table: dict[str, object], name: str, option: str) -> object:
    if name not in table:
        raise InputError(
            f"{option} must be of {', '.join(table)}, got {name!r}; choose from these"
        )
    return table[name]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if isfinite(number) else -1.0


def _density(text: str) -> float:
    number = _number(text)
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if number <= 0.0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number
