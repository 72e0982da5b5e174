"""`diffaccel info`: what is installed, which methods there are, which models are known."""

import argparse
from dataclasses import MISSING, fields

from rich.console import Console
from rich.table import Table


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "info",
        help="show versions, device, methods and supported models",
        description="Shows versions, device, methods with their knobs, and supported models.",
    )
    parser.set_defaults(execute=execute)


def execute(_arguments: argparse.Namespace) -> int:
    """Prints the tables."""
    from diffaccel.bindings import BINDINGS
    from diffaccel.cli.options.method_options import METHODS
    from diffaccel.machine import best_device, device_name, package_versions
    from diffaccel.pipelines.image.presets import SUPPORTED, SUPPORTED_VIDEO
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE

    console = Console()
    versions = Table("package", "version", title="Environment", title_justify="left")
    for name, number in package_versions().items():
        versions.add_row(name, number)
    versions.add_row("device", device_name(best_device()))
    for name in ("image", "video", "unet", "scorer"):
        is_there = EMBEDDED_IMAGE.with_name(name).is_dir()
        versions.add_row(f"embedded {name} model", "present" if is_there else "missing")
    console.print(versions)

    methods = Table("--method", "class", "knobs (--set)", title="Methods", title_justify="left")
    for name, method in METHODS.items():
        knobs = [
            field.name if field.default is MISSING else f"{field.name}={field.default!r}"
            for field in fields(method)
        ]
        methods.add_row(name, method.__name__, ", ".join(knobs) or "none")
    console.print(methods)

    models = Table("used by", "models", title="Supported models", title_justify="left")
    models.add_row("pipe.set_attn_processor", ", ".join(BINDINGS))
    models.add_row("diffaccel sample", ", ".join(SUPPORTED))
    models.add_row("diffaccel sample --frames", ", ".join(SUPPORTED_VIDEO))
    console.print(models)
    return 0
