"""Gives diffusers' pipeline classes our methods, whichever of the two packages comes first.

Where diffusers' base classes exist already they get the methods at once. Otherwise a finder waits
for the two modules that define them, so that importing this package does not import diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LateMethod:
    """A method that is imported when it is first looked up.

    Args:
        module: Where the function is.
        name: Of the function, whose first argument is the instance.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        function = getattr(import_module(self._module), self._name)
        return function if instance is None else function.__get__(instance, owner)


_SET_ATTN_PROCESSOR = LateMethod("diffaccel.attach.attachment", "set_attn_processor")
_SET_GUIDANCE = LateMethod("diffaccel.guidance.attachment", "set_guidance")
PIPELINES: dict[str, tuple[str, dict[str, LateMethod]]] = {
    "diffusers.pipelines.pipeline_utils": (
        "DiffusionPipeline",
        {"set_attn_processor": _SET_ATTN_PROCESSOR, "set_guidance": _SET_GUIDANCE},
    ),
    "diffusers.modular_pipelines.modular_pipeline": (
        "ModularPipeline",
        {"set_attn_processor": _SET_ATTN_PROCESSOR},
    ),
}
"""Module of diffusers -> its base class of pipelines, and the methods that this class gets."""


def attach_pipeline_methods() -> None:
    """Gives the pipeline classes their methods, now or as soon as they exist.

    Does nothing where that was done already.
    """
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    for name in PIPELINES:
        if name in sys.modules:
            # not sys.modules[name]: another thread may be in the middle of it, which this awaits
            _attach(import_module(name))


def _attach(module: ModuleType) -> None:
    """Adds what the class of a module lacks; a method of its own stays."""
    class_name, methods = PIPELINES[module.__name__]
    pipeline_class = getattr(module, class_name, None)
    if pipeline_class is None:
        return
    for name, method in methods.items():
        # hasattr would import what a late method stands for
        if not any(name in vars(base) for base in pipeline_class.__mro__):
            setattr(pipeline_class, name, method)


class _PipelineFinder(MetaPathFinder):
    """Finds the modules in `PIPELINES` as the finders after it do, and no other."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PIPELINES:
            return None
        # Those before this one have been asked; asking them again could go round in circles.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _AttachingLoader(spec.loader)
                return spec
        return None


class _AttachingLoader(Loader):
    """Runs a module by its own loader, then adds the methods.

    The module keeps its own loader, so that nothing shows that this one was there.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _attach(module)


FINDER = _PipelineFinder()
"""The one finder of this process."""
