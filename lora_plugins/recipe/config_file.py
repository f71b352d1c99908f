"""Read a YAML file of flags: plain values, each with its line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_plugins.errors import ArgumentsError
from lora_plugins.recipe.files import read_text
from lora_plugins.text import one_line

__all__ = ["read_flags"]


_MOST_BYTES = 1 << 20
#: Most values, with those that anchors repeat, and how deep they may be nested.
_MOST_VALUES = 10_000
_DEEPEST = 20

#: YAML tag of a type that no flag takes -> its name in messages.
_FOREIGN = {"timestamp": "a date", "binary": "binary data"}
_PLAIN = ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")


def read_flags(path: Path) -> dict[str, tuple[Any, int]]:
    """Return the values of a YAML file by name, each with its line.

    Raises:
        ArgumentsError: The file cannot be read, or holds a value that no flag takes; the message has the line.
    """
    try:
        loader = yaml.SafeLoader(read_text(path, _MOST_BYTES))
        root = loader.get_single_node()
        if root is None or root.tag.endswith(":null"):
            return {}
        if not isinstance(root, yaml.MappingNode):
            kind = type(loader.construct_document(root)).__name__
            raise ArgumentsError(f"--config {path} must hold 'name: value' lines, not a {kind}.")
        _check_nodes(root, path)
        loader.flatten_mapping(root)
        return {str(key.value): _read_value(loader, key, value, path) for key, value in root.value}
    except RecursionError:
        raise ArgumentsError(f"--config {path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ArgumentsError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise ArgumentsError(f"--config {path}{where} cannot be read: {reason}") from error


def _read_value(loader: Any, key: yaml.Node, value: yaml.Node, path: Path) -> tuple[Any, int]:
    line = int(value.start_mark.line) + 1
    try:
        return loader.construct_object(value, deep=True), line
    except (ValueError, yaml.YAMLError) as error:
        # Python refuses to read integers of thousands of digits.
        reason = getattr(error, "problem", None) or one_line(error)
        raise ArgumentsError(f"{path}, line {line}: the value of {key.value} cannot be read: {reason}") from error


def _check_nodes(root: yaml.Node, path: Path) -> None:
    """Reject values that contain themselves, are too deep or too many, or have a type that no flag takes.

    Raises:
        ArgumentsError: A value is rejected; the message names the line.
    """
    for count, (node, above) in enumerate(_walk(root, ())):
        place = f"{path}, line {node.start_mark.line + 1}"
        if any(node is outer for outer in above):
            raise ArgumentsError(f"{place}: the value contains itself")
        if len(above) > _DEEPEST or count > _MOST_VALUES:
            raise ArgumentsError(
                f"{place}: values may be {_DEEPEST} deep and {_MOST_VALUES:,} in all, with those that anchors repeat"
            )
        kind = node.tag.rpartition(":")[2]
        if kind not in _PLAIN:
            advice = " Put it in quotes." if kind == "timestamp" else ""
            raise ArgumentsError(f"{place}: {_FOREIGN.get(kind, node.tag)} cannot be the value of a flag.{advice}")


def _walk(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Iterator[tuple[yaml.Node, tuple[yaml.Node, ...]]]:
    yield node, above
    inside = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _walk(child, inside)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _walk(key, inside)
            yield from _walk(value, inside)
