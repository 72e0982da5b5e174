"""Which denoiser classes the installed diffusers has, and which of its pipelines use them.

Read from the source text of diffusers, so that neither it nor PyTorch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DENOISING = (
    "transformer", "transformer_2", "unconditional_transformer", "unet", "image_unet", "text_unet",
    "prior", "decoder", "diffusion_decoder", "prior_prior", "prior_decoder",
)  # fmt: skip
"""Names of the components that denoise."""


@dataclass(frozen=True, slots=True)
class DenoiserEntry:
    """One denoiser class of diffusers.

    Attributes:
        pipelines: Pipelines that have it as a component, ascending; modular ones are named by
            their folder.
        is_compiled_by_blocks: Whether it names blocks that repeat.
        is_context_parallel: Whether it comes with a plan for context parallelism.
    """

    pipelines: tuple[str, ...] = ()
    is_compiled_by_blocks: bool = False
    is_context_parallel: bool = False


@cache
def catalogue() -> dict[str, DenoiserEntry]:
    """Returns every denoiser class that a pipeline of diffusers names, by class name."""
    classes = {
        name: found
        for folder in ("models", "pipelines")
        for path in sorted((_diffusers() / folder).rglob("*.py"))
        for name, found in _classes(path.read_text(encoding="utf-8"))
    }
    users: dict[str, set[str]] = {}
    for name in classes:
        if name.endswith("Pipeline") and "DiffusionPipeline" in _ancestors(name, classes):
            for component in _components(name, classes):
                users.setdefault(component, set()).add(name)
    for component, folder in _modular_components():
        users.setdefault(component, set()).add(f"modular {folder}")
    return {
        name: DenoiserEntry(
            tuple(sorted(users[name])),
            _assigns(name, "_repeated_blocks", classes),
            _assigns(name, "_cp_plan", classes),
        )
        for name in sorted(users)
        if "ModelMixin" in _ancestors(name, classes)
    }


@dataclass(frozen=True, slots=True)
class _Class:
    """What is read of one class: its bases, its constructor, the attributes that it fills."""

    bases: tuple[str, ...]
    components: frozenset[str] | None
    assigned: frozenset[str]


_CLASS = re.compile(r"^class (\w+)\(([^)]*)\):", re.MULTILINE)
_INIT = re.compile(r"\n    def __init__\((.*?)\)(?: -> None)?:\n", re.DOTALL)
_COMPONENT = re.compile(rf"\b(?:{'|'.join(DENOISING)}): ([^=\n]*)")
_FILLED = re.compile(r"^    (_cp_plan|_repeated_blocks) = [\[{]\s*[^\]}\s]", re.MULTILINE)
_SPEC = re.compile(
    rf'ComponentSpec\(\s*(?:"(?:{"|".join(DENOISING)})"|self\.transformer_name),\s*(\w+)[,)]'
)


def _diffusers() -> Path:
    spec: Any = find_spec("diffusers")
    return Path(spec.origin).parent


def _classes(text: str) -> Iterator[tuple[str, _Class]]:
    heads = list(_CLASS.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=False):
        body = text[head.end() : end]
        init = _INIT.search(body)
        named = None
        if init is not None:
            named = frozenset(re.findall(r"\w+", " ".join(_COMPONENT.findall(init[1]))))
        bases = tuple(base.rpartition(".")[2] for base in re.findall(r"[\w.]+", head[2]))
        yield head[1], _Class(bases, named, frozenset(_FILLED.findall(body)))


def _ancestors(name: str, classes: dict[str, _Class]) -> set[str]:
    found: set[str] = set()
    waiting = [name] if name in classes else []
    while waiting:
        for base in classes[waiting.pop()].bases:
            if base not in found:
                found.add(base)
                waiting += [base] if base in classes else []
    return found


def _components(name: str, classes: dict[str, _Class]) -> frozenset[str]:
    """Returns the denoiser classes in the signature of a pipeline, an inherited one too."""
    found = classes[name]
    if found.components is not None:
        return found.components
    inherited = (_components(base, classes) for base in found.bases if base in classes)
    return frozenset().union(*inherited)


def _assigns(name: str, attribute: str, classes: dict[str, _Class]) -> bool:
    """Whether a model class, or one that it inherits from, fills an attribute."""
    names = {name} | _ancestors(name, classes)
    return any(attribute in classes[known].assigned for known in names if known in classes)


def _modular_components() -> Iterator[tuple[str, str]]:
    """Yields the denoiser classes that modular pipelines name, each with their folder."""
    folder = _diffusers() / "modular_pipelines"
    for path in sorted(folder.rglob("*.py")):
        for name in _SPEC.findall(path.read_text(encoding="utf-8")):
            yield name, path.relative_to(folder).parts[0]
