"""Options that all commands which make a model share, and all that evaluate one."""

import argparse
from pathlib import Path

import torch

from embedded.vocabulary import fetch_packages


def making(description: str, work: str = "build/embedded") -> argparse.ArgumentParser:
    """Returns a parser with the options of every command that makes a model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--out", type=Path, help="of the model; default: its name in --work")
    parser.add_argument("--packages", type=Path, help="folder of the npm archives")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--draw-only", action="store_true", help="only draw pictures; may run beside training"
    )
    return parser


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the words of a command that makes a model, and fetches what it draws from."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.packages = options.packages or options.work / "packages"
    fetch_packages(options.packages)
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def evaluating(description: str, out: str, count: int = 100) -> argparse.ArgumentParser:
    """Returns a parser with the options of every command that evaluates a finished folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("build/embedded/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/embedded") / out)
    parser.add_argument("--count", type=int, default=count)
    return parser


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of what pictures show."""
    parser.add_argument("--vocabulary", choices=("curated", "all"), default="curated")
