"""Find, load and read one plugin, and reject what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy

from lora_plugins.errors import PluginWarning
from lora_plugins.plugins.rejection import Rejected, explain
from lora_plugins.plugins.table import DISTRIBUTION, PluginInfo
from lora_plugins.plugins.types import Quantizer
from lora_plugins.text import did_you_mean

__all__ = [
    "Loaded",
    "check_quantizers",
    "check_unique",
    "collect",
    "describe_plugin",
    "find_entry_points",
    "load_plugin",
    "normalize",
    "read_own_version",
]

Record = TypeVar("Record")


@dataclass(slots=True)
class Loaded:
    """A plugin with its own pluggy manager.

    In a shared manager (pluggy 1.7.0), a plugin that raises ends the call for all others, one that fails
    validation stays registered, and one that cannot be hashed breaks the calls of all others.
    """

    info: PluginInfo
    plugin: object
    hooks: pluggy.PluginManager

    def implementations(self, hook: str) -> int:
        """Return how many functions of the plugin implement a hook."""
        found = getattr(self.hooks.hook, hook).get_hookimpls()
        return sum(not (impl.wrapper or impl.hookwrapper) for impl in found)

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook of the plugin and return the answers."""
        answers: list[Any] = getattr(self.hooks.hook, hook)(**arguments)
        return answers


def load_plugin(info: PluginInfo, plugin: object, manager: pluggy.PluginManager) -> Loaded:
    """Register a plugin's object with a manager of its own, which knows the hooks.

    Raises:
        Rejected: It has no hooks, or implements one that does not exist.
    """
    if plugin is None or isinstance(plugin, (str, bytes, int, float)):
        raise Rejected(f"its entry point names {plugin!r}, which is neither a module nor an object with hooks")
    loaded = Loaded(info, plugin, manager)
    loaded.hooks.register(plugin, f"{info.distribution}:{info.name}")
    _check_hooks(loaded)
    return loaded


def collect(loaded: Loaded, hook: str, record: type[Record]) -> list[Record]:
    """Return what a plugin's implementations of a hook return, in one list.

    Raises:
        Rejected: One does not return a list of such records.
    """
    answers = loaded.call(hook)
    if len(answers) < loaded.implementations(hook):
        # pluggy drops `None` from the results, so a forgotten `return` would silently register nothing.
        raise Rejected(f"{hook} must return a list of {record.__name__}, not None")
    records: list[Record] = []
    for answer in answers:
        if isinstance(answer, (str, bytes, record, Mapping)) or not isinstance(answer, Iterable):
            raise Rejected(f"{hook} must return a list of {record.__name__}, not {answer!r:.80}")
        for item in answer:
            if not isinstance(item, record):
                raise Rejected(f"{hook} must return a list of {record.__name__}; it holds {item!r:.80}")
            records.append(item)
    return records


def _check_hooks(loaded: Loaded) -> None:
    """Reject what pluggy accepts: unknown hooks, and a plugin without hooks."""
    callers = loaded.hooks.get_hookcallers(loaded.plugin) or []
    for caller in callers:
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            known = sorted(name for name, other in vars(loaded.hooks.hook).items() if other.has_spec())
            hint = did_you_mean(caller.name, known) or f" There are {', '.join(known)}."
            raise Rejected(f"it implements the hook {caller.name!r}, which does not exist.{hint}")
    if not any(caller.has_spec() for caller in callers):
        raise Rejected("it implements no hook; mark its functions with @lora_plugins.hookimpl")


def check_quantizers(quantizers: Iterable[Quantizer]) -> None:
    """Check what every backend must have.

    Raises:
        Rejected: A name or ``requires`` is not valid.
    """
    for quantizer in quantizers:
        _check_name(quantizer)
        _check_requires(quantizer)


def _check_name(quantizer: Quantizer) -> None:
    name = getattr(quantizer, "name", None)
    if not isinstance(name, str) or not name:
        raise Rejected(f"its backend {type(quantizer).__name__} must have a `name` that is a string, not {name!r}")


def _check_requires(quantizer: Quantizer) -> None:
    requires: Any = quantizer.requires
    # A bare string would be read letter by letter.
    if isinstance(requires, str) or not all(isinstance(item, str) for item in requires):
        raise Rejected(f"its backend {quantizer.name!r} must have a tuple of strings in `requires`, not {requires!r}")


def check_unique(kind: str, names: list[str]) -> None:
    """Check that a plugin registers no name twice.

    Raises:
        Rejected: It does.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Rejected(f"it registers the {kind} {', '.join(map(repr, twice))} twice")


def normalize(name: str) -> str:
    """Return the normalized form of a distribution name (PyPA rules), also used for plugin names."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def find_entry_points(group: str) -> Iterable[importlib.metadata.EntryPoint]:
    """Return all entry points of a group, even if an installed package has unreadable metadata."""
    try:
        return importlib.metadata.entry_points(group=group)
    except Exception as error:
        warnings.warn(
            f"An installed package has metadata that cannot be read ({explain(error)}); it is left out.",
            PluginWarning,
            stacklevel=2,
        )
        return _find_readable_entry_points(group)


def _find_readable_entry_points(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            entries = distribution.entry_points.select(group=group)
            # As on import, the first of several copies on the path counts.
            name = normalize(distribution.metadata["Name"])
        except Exception:  # noqa: S112 - a distribution that cannot be read is no plugin
            continue
        if name not in seen:
            seen.add(name)
            yield from entries


def describe_plugin(entry: importlib.metadata.EntryPoint) -> PluginInfo:
    """Describe a plugin before it is loaded; its package may lack a name or version."""
    try:
        distribution, version = entry.dist.name or "?", entry.dist.version or "?"  # type: ignore[union-attr]
    except Exception:
        distribution, version = "?", "?"
    return PluginInfo(entry.name, distribution, version, builtin=normalize(distribution) == DISTRIBUTION)


def read_own_version() -> str:
    """Return the version of this distribution, ``"?"`` if it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "?"
