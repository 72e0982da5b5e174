"""Faster and higher-resolution diffusion with sparse attention, on stock diffusers pipelines.

Importing the package gives every diffusers pipeline the method `set_attn_processor`:

    import diffaccel
    pipe.set_attn_processor(diffaccel.RectifiedSpaAttn())

The import itself loads neither PyTorch nor diffusers: a name is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "kernels").is_dir():
    # Python finds a clone's own folder first from the clone's root, before any installation, and
    # the wheel alone has `kernels`, `pipelines` and `benchmarks` inside: look beside it as well.
    __path__.append(str(Path(__file__).parents[1]))

from diffaccel.attach.pipeline_methods import attach_pipeline_methods

if TYPE_CHECKING:
    from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
    from diffaccel.guidance.attachment import restore_guidance, set_guidance
    from diffaccel.guidance.normalized.config import NormalizedAttention
    from diffaccel.guidance.perturb.blocks import PermuteTokens, SkipLayers
    from diffaccel.guidance.perturb.heads import HeadPerturbation
    from diffaccel.layout import TokenLayout
    from diffaccel.methods import (
        AgentAttn,
        BiFormerAttn,
        FlexPrefillAttn,
        FullAttn,
        HierarchicalWindowAttn,
        HiPAttn,
        HyperAttn,
        JitteredAttn,
        MoBAAttn,
        NeighborhoodAttn,
        PowerAttn,
        ProportionalAttn,
        RadialAttn,
        RectifiedSpaAttn,
        SlidingTileAttn,
        SlidingWindowAttn,
        SolAttn,
        SpargeAttn,
        SparseAttn,
        SubBlockAttn,
        SVGAttn,
        TokenMergingAttn,
        VGGTAttn,
        VMoBAAttn,
    )

    __version__: str

__all__ = [
    "AgentAttn",
    "BiFormerAttn",
    "FlexPrefillAttn",
    "FullAttn",
    "HeadPerturbation",
    "HiPAttn",
    "HierarchicalWindowAttn",
    "HyperAttn",
    "JitteredAttn",
    "MoBAAttn",
    "NeighborhoodAttn",
    "NormalizedAttention",
    "PermuteTokens",
    "PowerAttn",
    "ProportionalAttn",
    "RadialAttn",
    "RectifiedSpaAttn",
    "SVGAttn",
    "SkipLayers",
    "SlidingTileAttn",
    "SlidingWindowAttn",
    "SolAttn",
    "SpargeAttn",
    "SparseAttn",
    "SubBlockAttn",
    "TokenLayout",
    "TokenMergingAttn",
    "VGGTAttn",
    "VMoBAAttn",
    "restore_attn_processor",
    "restore_guidance",
    "set_attn_processor",
    "set_guidance",
]
_HOMES = {
    "HeadPerturbation": "guidance.perturb.heads",
    "NormalizedAttention": "guidance.normalized.config",
    "PermuteTokens": "guidance.perturb.blocks",
    "SkipLayers": "guidance.perturb.blocks",
    "TokenLayout": "layout",
    "restore_attn_processor": "attach.attachment",
    "restore_guidance": "guidance.attachment",
    "set_attn_processor": "attach.attachment",
    "set_guidance": "guidance.attachment",
}
"""Where public names live that are not in `methods`."""
_FOLDERS = ("bindings", "errors", "guidance", "kernels", "layout", "methods", "pipelines")
"""Parts that can be used as attributes after `import diffaccel` alone."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'methods')}"), name)
    elif name in _FOLDERS:
        value = import_module(f"{__name__}.{name}")
    elif name == "__version__":
        value = _installed_version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS, "__version__"})


def _installed_version() -> str:
    """The version in the metadata; a clone that is not installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "0+unknown"


attach_pipeline_methods()
