"""Reads what modules of this package declare from their source text.

So `diffaccel info` can list methods and models without importing them, and PyTorch with them.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def dataclass_fields(path: str) -> dict[str, str | None]:
    """Returns the fields of a dataclass, its own before those of its bases.

    Args:
        path: "module:class".

    Returns:
        Name -> repr of the default, None where there is none.
    """
    module, _, name = path.partition(":")
    found: dict[str, str | None] = {}
    body: Any
    (body,) = (node for node in _tree(module).body if _is_class(node, name))
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if not {"ClassVar", "KW_ONLY"} & set(re.findall(r"\w+", ast.unparse(node.annotation))):
            found[node.target.id] = _default(node.value)
    for base in body.bases:
        home = _home(module, ast.unparse(base))
        for field, default in (dataclass_fields(home) if home else {}).items():
            found.setdefault(field, default)
    return found


def table_keys(module: str, name: str) -> tuple[str, ...]:
    """Returns the keys of a dict that a module assigns to a name, or the items of a tuple."""
    for node in _tree(module).body:
        targets = (
            [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value: Any = getattr(node, "value", None)
            listed = value.keys if hasattr(value, "keys") else value.elts
            return tuple(ast.literal_eval(item) for item in listed)
    raise LookupError(f"{module} assigns no {name}")


@cache
def _tree(module: str) -> ast.Module:
    """Parses a module of this package; only its first two levels are imported."""
    top = ".".join(module.split(".")[:2])
    spec: Any = find_spec(top)
    path = Path(spec.origin)
    if path.name == "__init__.py" and module != top:
        path = path.parent.joinpath(*module.split(".")[2:]).with_suffix(".py")
        if not path.exists():
            path = path.with_suffix("") / "__init__.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def _is_class(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


def _home(module: str, name: str) -> str | None:
    """Returns "module:class" of a name that a module defines or imports from this package."""
    for node in _tree(module).body:
        if _is_class(node, name):
            return f"{module}:{name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffaccel."):
            if any(alias.name == name for alias in node.names):
                return f"{node.module}:{name}"
    return None


def _default(value: ast.expr | None) -> str | None:
    """Returns the repr of a default; `field(default=...)` counts as its default."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    if value is None:
        return None
    try:
        return repr(ast.literal_eval(value))
    except ValueError:
        return ast.unparse(value)
