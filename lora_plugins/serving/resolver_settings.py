"""What a server that asks the registry by itself is configured with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_plugins.errors import InvalidServingSetting

__all__ = ["ALLOW", "REFRESH", "VARIABLE", "ResolverSettings"]

#: Environment variables: the registry, the names that it may be asked for, and the seconds between two looks at it.
VARIABLE = "LORA_PLUGINS_VLLM"
ALLOW = "LORA_PLUGINS_VLLM_ALLOW"
REFRESH = "LORA_PLUGINS_VLLM_REFRESH"

_SECONDS = 60.0
_PATTERN = re.compile(r"\*|[\w.-]+/(?:\*|[\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class ResolverSettings:
    """Configuration of a resolver.

    Attributes:
        registry: Address of the registry.
        allowed: ``org/name``, ``org/*`` or ``*``. Without any, every name of a folder or an object store, and none of a
            hub, which everybody can publish to.
        refresh: Seconds after which names are looked up again.
    """

    registry: str
    allowed: tuple[str, ...] = ()
    refresh: float = _SECONDS

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> ResolverSettings | None:
        """Read the settings; ``None`` if there is no registry among them.

        Raises:
            InvalidServingSetting: A variable has a value that it cannot have.
        """
        registry = environment.get(VARIABLE, "").strip()
        if not registry:
            return None
        allowed = tuple(part.strip() for part in environment.get(ALLOW, "").split(",") if part.strip())
        for pattern in allowed:
            if _PATTERN.fullmatch(pattern) is None:
                raise InvalidServingSetting(
                    f"{ALLOW} has {pattern!r}, which is neither org/name nor org/* nor *. Several are joined by commas."
                )
        return cls(registry, allowed, _read_seconds(environment.get(REFRESH, "")))

    def allows(self, name: str) -> bool:
        """Whether an adapter may be served, by its ``org/name``."""
        if not self.allowed:
            return not self.registry.startswith(("http://", "https://"))
        return any(pattern in ("*", name, f"{name.partition('/')[0]}/*") for pattern in self.allowed)


def _read_seconds(text: str) -> float:
    try:
        found = float(text) if text.strip() else _SECONDS
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise InvalidServingSetting(f"{REFRESH}={text!r} must be a number of seconds above 0")
    return found
