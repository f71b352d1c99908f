"""Keep fields as the user wrote them where PEFT reads the same."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from lora_plugins.targets.patterns import is_cheap, match_paths
from lora_plugins.targets.peft_names import shortest_names

__all__ = ["keep_written", "matched_by_peft", "resolve_tables"]


#: The fields by which PEFT decides which modules it adapts.
_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
#: Most alternatives in a pattern for modules to leave out.
_MOST_PARTS = 4


def matched_by_peft(config: Any, paths: Iterable[str]) -> list[str]:
    """Return the paths that PEFT would adapt by the fields of a configuration."""
    return [path for path in paths if check_target_module_exists(config, path)]


def keep_written(
    asked: Mapping[str, Any], chosen: Collection[str], paths: Sequence[str], saved: Sequence[str]
) -> dict[str, Any] | None:
    """Return the fields as they were written, if PEFT reads them as the chosen modules and no others.

    Where short names also mean modules that were left out, such as those of an encoder beside the language model,
    a pattern in ``exclude_modules`` leaves them out.

    Args:
        asked: The fields of ``peft.LoraConfig`` that were given.
        chosen: Paths of the modules that get adapters.
        paths: Paths of all modules of the model.
        saved: Names of modules that are saved whole, which PEFT never adapts.
    """
    fields: dict[str, Any] = {name: asked.get(name) for name in _FIELDS}
    names = fields["target_modules"]
    if not names or not _is_safe(fields, paths):
        return None
    fields["target_modules"] = names if isinstance(names, str) else set(names)
    if isinstance(fields["layers_to_transform"], (set, tuple)):
        fields["layers_to_transform"] = sorted(fields["layers_to_transform"])
    config = SimpleNamespace(**fields, modules_to_save=list(saved), target_parameters=None)
    wanted = set(chosen)
    found = set(matched_by_peft(config, paths))
    if found > wanted and not fields["exclude_modules"]:
        config.exclude_modules = fields["exclude_modules"] = _leave_out(found - wanted, wanted, paths)
        found = set(matched_by_peft(config, paths)) if fields["exclude_modules"] else found
    return fields if found == wanted else None


def _is_safe(fields: Mapping[str, Any], paths: Sequence[str]) -> bool:
    """Whether PEFT's own matching of these fields takes little time."""
    patterns = [fields[name] for name in ("target_modules", "exclude_modules") if isinstance(fields[name], str)]
    layers = fields["layers_pattern"] or ()
    composed = [rf"(?:^|.*?\.){layer}\.\d+\." for layer in ([layers] if isinstance(layers, str) else layers)]
    return all(is_cheap(pattern, paths) for pattern in [*patterns, *composed])


def _leave_out(unwanted: Iterable[str], wanted: Collection[str], paths: Sequence[str]) -> str | None:
    """Return a pattern for the largest parts of a model that hold unwanted modules and no wanted one."""
    above_wanted = {end for path in wanted for end in _list_beginnings(path)}
    parts = {next(start for start in _list_beginnings(path) if start not in above_wanted) for path in unwanted}
    if len(parts) > _MOST_PARTS:
        return None
    names = [re.escape(name) for name in shortest_names(parts, paths)]
    return rf"(.*\.)?({'|'.join(names)})(\..*)?"


def _list_beginnings(path: str) -> Iterable[str]:
    """Return the beginnings of a dotted path, shortest first, the path itself last."""
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def resolve_tables(asked: Mapping[str, Any], paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return rank and alpha patterns in which names replace every key that PEFT may take long to match.

    Args:
        asked: The fields of ``peft.LoraConfig`` that were given.
        paths: Paths of the modules that get adapters.

    Raises:
        TargetError: A key is not a valid pattern, or matching it takes too long.
    """
    tables = {field: asked.get(field) for field in ("rank_pattern", "alpha_pattern")}
    return {field: _resolve_keys(table, paths, field) for field, table in tables.items() if table}


def _resolve_keys(table: Mapping[str, Any], paths: Sequence[str], field: str) -> dict[str, Any]:
    resolved: dict[str, Any] = {}
    for key, value in table.items():
        # PEFT builds its pattern from a key in this way.
        pattern = rf"(.*\.)?({key})"
        names = [key] if is_cheap(pattern, paths) else [re.escape(p) for p in match_paths(pattern, paths, field)]
        resolved |= {name: resolved.get(name, value) for name in names}
    return resolved
