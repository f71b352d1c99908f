"""Store what plugins register by name, and resolve conflicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["BLOCK_VARIABLE", "DISTRIBUTION", "PluginInfo", "Table"]

#: The distribution of both import packages; its own entry points count as built-in.
DISTRIBUTION = "lora-plugins"

BLOCK_VARIABLE = "LORA_PLUGINS_BLOCK"

T = TypeVar("T")


@dataclass(slots=True)
class PluginInfo:
    """One plugin, as ``lora-plugins plugins`` lists it.

    Attributes:
        name: Entry-point name, or the last part of the module's name for a built-in.
        distribution: Name of the installed package it comes from.
        version: That package's version, ``"?"`` when unknown.
        builtin: Whether lora-plugins itself ships it.
        architectures: ``model_type`` of each architecture it registers.
        quantizers: Name of each backend it registers.
        servers: Name of each server whose rules it registers.
        commands: Name of each command it adds to the program.
        formats: ``quant_method`` of each storage format it describes.
        disabled: Why it is switched off; ``None`` if it is active.
        notes: Its name conflicts and overrides, and whether it slows down every command.
        requires: The distributions that each of its backends needs, by backend name.
        checks: Name of each check of adapters it adds.
    """

    name: str
    distribution: str
    version: str
    builtin: bool
    architectures: list[str] = field(default_factory=list)
    quantizers: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    disabled: str | None = None
    notes: list[str] = field(default_factory=list)
    requires: dict[str, list[str]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


class Table(Generic[T]):
    """Entries by name. A third-party entry overrides a built-in one; two third-party entries are a conflict."""

    def __init__(self, kind: str, conflict: type[Exception]) -> None:
        self._kind = kind
        self._conflict = conflict
        self._offers: dict[str, list[tuple[PluginInfo, T]]] = {}

    def add(self, name: str, info: PluginInfo, thing: T) -> None:
        self._offers.setdefault(name, []).append((info, thing))

    def names(self) -> list[str]:
        return sorted(self._offers)

    def things(self) -> list[T]:
        """Return every registered entry, including conflicting and overridden ones."""
        return [thing for offers in self._offers.values() for _, thing in offers]

    def _choose(self, name: str) -> list[tuple[PluginInfo, T]]:
        offers = self._offers.get(name, [])
        return [offer for offer in offers if not offer[0].builtin] or offers

    def get(self, name: str) -> T | None:
        """Return the entry for a name, ``None`` if there is none; raise the table's conflict error if two claim it."""
        return self._find(name)[1]

    def owner(self, name: str) -> PluginInfo | None:
        """Return the plugin whose entry `get` returns, ``None`` if there is none; raise as `get` does."""
        return self._find(name)[0]

    def _find(self, name: str) -> tuple[PluginInfo, T] | tuple[None, None]:
        best = self._choose(name)
        if len(best) > 1:
            raise self._conflict(self._describe_clash(name, [info for info, _ in best]))
        return best[0] if best else (None, None)

    def _describe_clash(self, name: str, infos: list[PluginInfo]) -> str:
        # Entry points of two packages may share a name; blocking that name would switch off both.
        names = [info.name for info in infos]
        handles = names if len(set(names)) == len(names) else [info.distribution for info in infos]
        blocks = " or ".join(f"{BLOCK_VARIABLE}={handle}" for handle in handles)
        return (
            f"The {self._kind} {name!r} is registered by {' and by '.join(map(str, infos))}. "
            f"Uninstall one of them, or switch one off with {blocks}."
        )

    def annotate(self) -> None:
        """Add every conflict and override to the notes of the plugins concerned."""
        for name, offers in self._offers.items():
            best = self._choose(name)
            if len(best) > 1:
                for info, _ in best:
                    info.notes.append("clash: " + self._describe_clash(name, [other for other, _ in best]))
            elif len(offers) > 1:
                best[0][0].notes.append(f"overrides the built-in {self._kind} {name!r}")
