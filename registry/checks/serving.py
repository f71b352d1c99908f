"""Which servers take an adapter, by the rules that lora_plugins has.

The rules are records of `lora_plugins`, which its plugins extend. They are reached through the entry point by which the
registry is a plugin, as the checks of other plugins are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from registry.checks.plugins import load_plugin
from registry.errors import UnservedAdapter
from registry.formats.records import BaseKind, BaseRecord

__all__ = ["Verdict", "check_serving", "describe_base", "judge_serving", "require_servers"]


class Verdict(Protocol):
    """Whether a server takes an adapter: ``lora_plugins.ServingVerdict``."""

    @property
    def server(self) -> str:
        """Name of the server."""

    @property
    def version(self) -> str:
        """The release whose source its rules were read from."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not take the adapter; empty if it does."""

    @property
    def not_known(self) -> tuple[str, ...]:
        """What the rules leave open."""

    @property
    def served(self) -> bool:
        """Whether no rule speaks against it."""


def judge_serving(
    fields: Mapping[str, Any],
    names: Iterable[str],
    base: Mapping[str, Any] | None,
    servers: Collection[str] | None = None,
) -> Sequence[Verdict]:
    """Return each server's verdict on an adapter, sorted by name; empty if lora_plugins is not installed.

    Args:
        fields: The adapter's configuration.
        names: Names of its tensors.
        base: Configuration of the base, as far as it is known.
        servers: Names of servers; all of them by default.

    Raises:
        lora_plugins.errors.UnknownServer: A name is not registered.
    """
    plugin = load_plugin()
    found: Sequence[Verdict] = () if plugin is None else plugin.judge_serving(fields, names, base, servers)
    return found


def require_servers(servers: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of servers as a tuple, each of which must be known.

    Raises:
        lora_plugins.errors.UnknownServer: A name is not registered.
        UnservedAdapter: The package with the rules is not installed.
    """
    names = (servers,) if isinstance(servers, str) else tuple(servers)
    plugin = load_plugin() if names else None
    if names and plugin is None:
        raise UnservedAdapter(
            f"The rules of {', '.join(names)} cannot be asked: the package lora-plugins is not installed, only found. "
            "Run `pip install lora-plugins`."
        )
    if plugin is not None:
        plugin.check_servers(names)
    return names


def check_serving(
    title: str,
    fields: Mapping[str, Any],
    names: Iterable[str],
    base: Mapping[str, Any] | None,
    servers: Collection[str],
) -> None:
    """Refuse an adapter that a server which it is for does not take.

    Raises:
        UnservedAdapter: One does not; the message says which, and why.
        lora_plugins.errors.UnknownServer: A name is not registered.
    """
    refused = [str(one) for one in judge_serving(fields, names, base, servers) if not one.served] if servers else []
    if refused:
        raise UnservedAdapter(
            f"{title} is for {', '.join(sorted(servers))}, and {'; '.join(refused)}. Train it without that, push it "
            "without serve= (--serve), or serve the merged model: lora-plugins merge"
        )


def describe_base(kind: BaseKind, base: BaseRecord) -> Mapping[str, Any] | None:
    """Return what is recorded of a base's configuration, nested as in ``config.json``; ``None`` without its type."""
    if kind.model_type is None:
        return None
    values: dict[str, Any] = {"model_type": kind.model_type}
    for key, value in (base.fingerprint.config if base.fingerprint else {}).items():
        outer, dot, inner = key.partition(".")
        if not dot:
            values.setdefault(key, value)
        elif isinstance(values.setdefault(outer, {}), dict):
            values[outer][inner] = value
    return values
