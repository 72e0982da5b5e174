"""The command line: `diffaccel sample`, `plan`, `bench`, `heads` and `info`.

Exit codes: 0 done; 2 bad arguments or input, with one sentence on the error stream; 1 anything
else. Heavy imports wait until the arguments are known to be good.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from diffaccel.cli import bench, heads, info, plan, sample
from diffaccel.errors import InputError


class OneSentenceParser(argparse.ArgumentParser):
    """Reports a bad argument in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = OneSentenceParser(
        prog="diffaccel",
        description="Faster and higher-resolution diffusion with sparse attention.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for module in (sample, plan, bench, heads, info):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after the program's name, those of the process by default.

    Returns:
        The exit code.
    """
    try:
        chosen = build_parser().parse_args(arguments)
        return chosen.execute(chosen)
    except InputError as error:
        print(f"diffaccel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffaccel: interrupted; nothing was written", file=sys.stderr)
        return 1


def run() -> NoReturn:
    """Entry point of the console script."""
    from diffaccel.machine import quiet_libraries

    quiet_libraries()
    sys.exit(main())
