"""Tiny denoisers of every class that a binding knows, built offline, by class name.

Each file holds one kind of denoiser and a table `MODELS`: name -> builder. A class that is run in
several ways (with and without reference images, say) has one name for each: `Class`, `Class:way`.
"""

from __future__ import annotations

import importlib
import pkgutil

from tiny_models.base import Builder, TinyModel

__all__ = ["MODELS", "Builder", "TinyModel"]

MODELS: dict[str, Builder] = {}

for _found in pkgutil.iter_modules(__path__):
    if _found.name != "base":
        MODELS |= importlib.import_module(f"{__name__}.{_found.name}").MODELS
