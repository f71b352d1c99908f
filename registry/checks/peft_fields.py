"""The fields of the installed PEFT's LoraConfig, read without loading it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import sys
from pathlib import Path

__all__ = ["read_known_fields", "read_peft_version"]

#: Where PEFT defines the configuration and its parents.
_SOURCES = ("config.py", "tuners/lora/config.py")
_CLASSES = ("PeftConfigMixin", "PeftConfig", "LoraConfig")


def read_peft_version() -> str | None:
    """Return the installed PEFT's version; ``None`` without PEFT."""
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return None


def read_known_fields() -> frozenset[str] | None:
    """Return the fields that the installed PEFT's ``LoraConfig`` takes; ``None`` if they cannot be found out.

    Importing PEFT loads torch; unless that has happened, its source is parsed instead.
    """
    if "peft" in sys.modules:
        return frozenset(inspect.signature(sys.modules["peft"].LoraConfig).parameters)
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        return None
    try:
        trees = [ast.parse((Path(spec.origin).parent / name).read_bytes()) for name in _SOURCES]
    except (OSError, SyntaxError):
        return None
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if not set(_CLASSES) <= set(classes):
        return None
    return frozenset(name for found in _CLASSES for name in _list_fields(classes[found]))


def _list_fields(node: ast.ClassDef) -> list[str]:
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return [item.target.id for item in fields if isinstance(item.target, ast.Name)]
