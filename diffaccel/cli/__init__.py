"""The command line: `diffaccel sample`, `plan`, `bench`, `heads` and `info`.

Exit codes: 0 done; 2 bad arguments or input, with one sentence on the error stream; 1 anything
else. A command's module is imported when it is called, PyTorch when its options are known to be
good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from diffaccel.errors import InputError

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = {
    "sample": "diffaccel.cli.sample:sample",
    "plan": "diffaccel.cli.plan:plan",
    "bench": "diffaccel.cli.bench:bench",
    "heads": "diffaccel.cli.heads:heads",
    "info": "diffaccel.cli.info:info",
}
HELP_FLAGS = ("--help", "-h")


def build_app() -> App:
    """Builds the command line, without importing any command."""
    from cyclopts import App, Parameter

    import diffaccel

    app = App(
        name="diffaccel",
        help="Faster and higher-resolution diffusion with sparse attention.",
        version=lambda: diffaccel.__version__,
        version_flags=["--version"],
        help_flags=HELP_FLAGS,
        # Of an option that is given twice the last one counts; nothing is read as JSON.
        default_parameter=Parameter(
            negative=(),
            show_default=False,
            allow_repeating=True,
            json_list=False,
            json_dict=False,
        ),
    )
    for number, (name, path) in enumerate(COMMANDS.items()):
        app.command(path, name=name, sort_key=number)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after the program's name, those of the process by default.

    Returns:
        The exit code.
    """
    from cyclopts import CycloptsError

    from diffaccel.cli.sentences import missing_command, sentence

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app = build_app()
        if words and words[0] in HELP_FLAGS:
            for name in COMMANDS:  # the list of commands takes a line of each one's docstring
                app[name]
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        if command.__name__ == "help_print" and not set(words) & set(HELP_FLAGS):
            raise InputError(missing_command(app, words))
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        print(f"diffaccel: {sentence(error)}", file=sys.stderr)
        return 2
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
