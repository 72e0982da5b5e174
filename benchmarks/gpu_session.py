"""Runs everything that awaits a CUDA GPU, in one go of at most eight minutes.

    python benchmarks/gpu_session.py --output DIR

CUDA tests, the kernel benchmark on the longest shapes, and the embedded model at 4096x4096 with
three methods. Each part is a process with a time limit of its own, so that a part that fails,
hangs or crashes the device's context leaves the results of the others. DIR then holds
`session.json` (each part's command, exit code, seconds and record), `session.log`, `kernels.csv`,
`kernels.png` and one picture a method: few files, none of them large. The package must be
installed (`pip install -e .`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
CLI = (sys.executable, "-c", "from diffaccel.cli import run; run()")
METHODS = ("full", "rectified", "neighborhood")
TOTAL_SECONDS = 480


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the session.

    Args:
        name: What it does.
        command: Program and arguments.
        limit: Seconds after which it is ended.
        folder: Where it runs.
        record: A JSON file that it writes beside its result; taken into `session.json`.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    folder: Path
    record: Path | None = None


def plan(output: Path, is_rehearsal: bool = False) -> list[Part]:
    """Lists the parts.

    Args:
        output: Where results go, an absolute path.
        is_rehearsal: The same parts, small and on the CPU.
    """
    tests = sorted(str(path) for path in ROOT.glob("tests/**/test_*cuda*.py"))
    pytest = (sys.executable, "-m", "pytest", "-q", "--durations=5", *tests)
    parts = [
        Part("tests", pytest, 100, ROOT),
        Part("kernels", (*CLI, *_kernel_words(output, is_rehearsal)), 200, output),
    ]
    for method in METHODS:
        picture = output / f"{method}.jpg"
        words = _sample_words(picture, method, is_rehearsal)
        record = picture.with_name(picture.name + ".json")
        parts.append(Part(f"sample {method}", (*CLI, *words), 60, output, record))
    return parts


def _kernel_words(output: Path, is_rehearsal: bool) -> tuple[str, ...]:
    what = (
        "--shapes flux-4k wan-14b-720p wan-1.3b-480p --dtypes bf16 --device cuda "
        "--densities 0.05 0.1 0.25 0.5 --row-seconds 0.4 --time-limit 165"
    )
    if is_rehearsal:
        what = (
            "--shapes embedded-256 --dtypes fp32 --device cpu --heads 1 --block 64 "
            "--densities 0.25 --repetitions 3 --row-seconds 0.05 --time-limit 60"
        )
    files = ("--csv", str(output / "kernels.csv"), "--plot", str(output / "kernels.png"))
    return ("bench", "kernels", *what.split(), *files)


def _sample_words(picture: Path, method: str, is_rehearsal: bool) -> tuple[str, ...]:
    how = "--size 4096x4096 --device cuda --seed 0"
    if is_rehearsal:
        how = "--size 512x512 --device cpu --seed 0 --steps 2 --refine-steps 1"
    prompt = "a red apple and a rocket on a blue background"
    return ("sample", prompt, *how.split(), "--method", method, "-o", str(picture))


def run_parts(parts: Sequence[Part], log_path: Path, total_seconds: float) -> list[dict]:
    """Runs the parts one after the other, whatever becomes of each.

    Args:
        parts: In this order.
        log_path: Gets the output of all of them.
        total_seconds: For all; a part gets the smaller of its limit and what is left.

    Returns:
        For each part its name, command, exit code (None where it was ended or not begun),
        seconds, outcome and record.
    """
    started, results = perf_counter(), []
    with open(log_path, "w", encoding="utf-8") as log:
        for part in parts:
            left = total_seconds - (perf_counter() - started)
            print(f"\n##### {part.name}: {' '.join(part.command)}", file=log, flush=True)
            results.append(_run(part, min(part.limit, left), log.fileno()))
            last = results[-1]
            print(f"{last['name']}: {last['outcome']} after {last['seconds']} s", flush=True)
            _write_json(log_path.with_name("session.json"), results)
    return results


def _run(part: Part, limit: float, log: int) -> dict:
    result = {"name": part.name, "command": list(part.command), "exit_code": None, "seconds": 0.0}
    if limit <= 0:
        return {**result, "outcome": "not begun: the session's time was used up"}
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # or kernels/ of the checkout hides the package of that name
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    started = perf_counter()
    process = subprocess.Popen(
        part.command, cwd=part.folder, env=environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        result["exit_code"] = process.wait(limit)
        result["outcome"] = "done" if result["exit_code"] == 0 else "failed"
    except subprocess.TimeoutExpired:
        result["outcome"] = f"ended: its limit of {limit:.0f} s was reached"
    finally:
        if process.poll() is None:  # with the processes that it started, compilers for one
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result["seconds"] = round(perf_counter() - started, 1)
    if part.record is not None and part.record.is_file():
        result["record"] = json.loads(part.record.read_text(encoding="utf-8"))
        part.record.unlink()
    return result


def _write_json(path: Path, results: list[dict]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the session; returns 0 if every part succeeded, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder, made where missing")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="for all parts (default: 480)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the same parts, small and on the CPU"
    )
    options = parser.parse_args(argv)
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print(
                "gpu_session: a CUDA GPU is needed, PyTorch sees none; run it on one, or pass "
                "--rehearse for small problems on the CPU",
                file=sys.stderr,
            )
            return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    parts = plan(output, options.rehearse)
    results = run_parts(parts, output / "session.log", options.seconds)
    return 0 if all(result["outcome"] == "done" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
