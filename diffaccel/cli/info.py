"""`diffaccel info`: what is installed, which methods there are, which models are known.

Loads neither PyTorch nor diffusers: what modules declare is read from their source.
"""

from importlib.resources import files

from rich.console import Console
from rich.table import Table

from diffaccel.cli.declared import table_keys
from diffaccel.cli.options.method_options import knobs_of
from diffaccel.machine import likely_device, package_versions
from diffaccel.methods.names import METHODS


def info() -> None:
    """Show versions, device, methods with their knobs, and supported models."""
    console = Console()
    versions = Table("package", "version", title="Environment", title_justify="left")
    for name, number in package_versions().items():
        versions.add_row(name, number)
    versions.add_row("device", likely_device())
    for name in ("image", "video", "unet", "scorer"):
        is_there = (files("diffaccel.pipelines") / "embedded" / name).is_dir()
        versions.add_row(f"embedded {name} model", "present" if is_there else "missing")
    console.print(versions)

    methods = Table("--method", "class", "knobs (--set)", title="Methods", title_justify="left")
    for name, path in METHODS.items():
        knobs = [
            knob if default is None else f"{knob}={default}"
            for knob, default in knobs_of(name).items()
        ]
        methods.add_row(name, path.partition(":")[2], ", ".join(knobs) or "none")
    console.print(methods)

    models = Table("used by", "models", title="Supported models", title_justify="left")
    presets = "diffaccel.pipelines.image.presets"
    for user, module, table in (
        ("pipe.set_attn_processor", "diffaccel.bindings", "BINDINGS"),
        ("diffaccel sample", presets, "BY_PIPELINE"),
        ("diffaccel sample --frames", presets, "SUPPORTED_VIDEO"),
    ):
        models.add_row(user, ", ".join(table_keys(module, table)))
    console.print(models)
