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


def info(*, models: bool = False) -> None:
    """Show versions, device, methods with their knobs, and supported models.

    Args:
        models: List every denoiser class of the installed diffusers instead: what works with it,
            or why nothing does.
    """
    console = Console()
    if models:
        _list_models(console)
        return
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

    used = Table("used by", "models", title="Supported models", title_justify="left")
    presets = "diffaccel.pipelines.image.presets"
    for user, module, table in (
        ("pipe.set_attn_processor", "diffaccel.bindings", "BINDINGS"),
        ("diffaccel sample", presets, "BY_PIPELINE"),
        ("diffaccel sample --frames", presets, "SUPPORTED_VIDEO"),
    ):
        used.add_row(user, ", ".join(table_keys(module, table)))
    console.print(used)


def _list_models(console: Console) -> None:
    from diffaccel.bindings import BINDINGS, REFUSED
    from diffaccel.bindings.catalogue import catalogue
    from diffaccel.methods.published import PUBLISHED, Published

    entries = catalogue()
    served = Table(
        "denoiser", "text", "rope", "settings", "blocks", "parallel", "pipelines",
        title="Denoisers that methods serve", title_justify="left",
    )  # fmt: skip
    for name in sorted(entries.keys() & BINDINGS.keys()):
        binding, entry = BINDINGS[name], entries[name]
        served.add_row(
            name,
            binding.text_kind,
            _mark(binding.scales_rope),
            "published"
            if any(PUBLISHED[family] != Published() for family in binding.families())
            else "reasoned",
            _mark(entry.is_compiled_by_blocks),
            _mark(entry.is_context_parallel),
            ", ".join(entry.pipelines),
        )
    console.print(served)
    console.print(
        "text: joint with the picture in one attention, or cross-attended. rope: rotary positions "
        "can be scaled to other sizes. settings: what RectifiedSpaAttn drops, and where it stays "
        "dense, was published for the model; elsewhere it drops 0.8 everywhere, a reasoned "
        "default. blocks: compile_repeated_blocks() works. parallel: comes "
        "with a plan for context parallelism."
    )
    refused = Table("denoiser", "why not", "pipelines", title="Denoisers that no method serves",
                    title_justify="left")  # fmt: skip
    for name in sorted(entries.keys() - BINDINGS.keys()):
        reason = REFUSED.get(name, "newer than this version of diffaccel")
        refused.add_row(name, reason, ", ".join(entries[name].pipelines))
    console.print(refused)


def _mark(is_so: bool) -> str:
    return "yes" if is_so else ""
