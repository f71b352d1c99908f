"""Find the release that a name means, and check it for a served base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from lora_plugins.errors import RefusedAdapter
from lora_plugins.plugins.traits import judge_adapter
from lora_plugins.serving.resolver_settings import ALLOW, ResolverSettings
from registry import (
    Adapter,
    Reference,
    changes_base,
    check_contract,
    expand_path,
    open_hub,
    pull_adapter,
    read_base_config,
)

__all__ = ["FoundRelease", "ReleaseFinder", "ServedBase", "ServedNames", "describe_base"]


@dataclass(frozen=True)
class ServedBase:
    """The base model that a server has loaded.

    Attributes:
        name: Its folder, or its id on a hub.
        revision: Its branch, tag or commit there.
    """

    name: str
    revision: str | None = None

    def find(self) -> Path | str:
        """Return the folder that holds it; else its id with the revision, for a look at the hub."""
        folder = expand_path(self.name)
        if folder.is_dir():
            return folder
        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class FoundRelease:
    """A release that a server may serve.

    Attributes:
        title: ``org/name@version``.
        path: Its folder.
        digest: sha256 of its manifest.
        warnings: What its users must know: that it is withdrawn, or that it comes from the cache.
    """

    title: str
    path: str
    digest: str
    warnings: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """A number from 1 to 2 ** 31 - 1, the same in every process: engines keep adapters by it in 32 bits."""
        return 1 + int(self.digest[:16], 16) % (2**31 - 1)


class ReleaseFinder:
    """Pulls releases from one registry and checks them for one server.

    Calls must not overlap: warnings are caught, which Python does for a whole process.

    Args:
        settings: The registry, and the names that are allowed.
        server: Name of the server whose rules hold.

    Raises:
        InvalidReference: The address of the registry is malformed.
    """

    def __init__(self, settings: ResolverSettings, server: str) -> None:
        self.settings = settings
        self.server = server
        self._hub = open_hub(settings.registry)
        self._checked: set[tuple[str, ServedBase]] = set()
        self._numbers: dict[int, str] = {}

    def require_allowed(self, name: str) -> None:
        """Refuse a name that may not be asked for, before the registry is.

        Raises:
            RefusedAdapter: It is not among the allowed ones.
        """
        if not self.settings.allows(name):
            known = ", ".join(self.settings.allowed) or "none of a hub by default"
            raise RefusedAdapter(f"{name} is not allowed. Allowed are: {known}. {ALLOW} lists them.")

    def find(self, name: str, base: ServedBase) -> FoundRelease:
        """Return the release that a name means now.

        The lock file of the working directory holds, if there is one. What is not the same release for the same base
        as before is checked: that it belongs to this very base, and that the server takes it.

        Args:
            name: A reference: ``org/name@1.2.0``, ``org/name@champion``, ``org/name>=1.2,<2``.
            base: The served base.

        Raises:
            RefusedAdapter: It is not allowed, not surely for this base, or the server does not take it.
            registry.errors.RegistryError: There is no such release, the registry does not answer and the cache has
                none, or something about it is wrong.
        """
        self.require_allowed(Reference.parse(name).name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter = pull_adapter(name, hub=self._hub)
            digest = adapter.manifest.digest
            if (digest, base) not in self._checked:
                self._check(adapter, base)
                self._checked.add((digest, base))
        found = FoundRelease(str(adapter), adapter.path, digest, _list_messages(caught))
        if self._numbers.setdefault(found.number, digest) != digest:
            raise RefusedAdapter(
                f"{found.title} has the number of another served release. Start a server for it alone."
            )
        return found

    def _check(self, adapter: Adapter, base: ServedBase) -> None:
        place = base.find()
        result = check_contract(adapter, place)
        if result.identity != "verified":
            raise RefusedAdapter(
                f"{adapter} fits {base.name} by names, shapes and configuration, but that this is the model it was "
                f"trained on could not be verified: {result.details}"
            )
        fields = adapter.config.fields
        described = describe_base(place)
        changed = changes_base(fields.get("init_lora_weights"))
        (verdict,) = judge_adapter(fields, adapter.manifest.tensors, described, [self.server], changes_base=changed)
        if not verdict.served:
            raise RefusedAdapter(f"{adapter}: {verdict}")


class ServedNames:
    """What each served name means, for a limited number of names: one release has endlessly many ranges that mean it.

    Args:
        most: Names that are kept at most.

    Attributes:
        titles: ``org/name@version`` by name, the oldest first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.titles: dict[str, str] = {}
        self._missed: set[str] = set()

    def keep(self, name: str, title: str) -> str | None:
        """Note what a name means; return the name that had to go for it: one that was missed, else the oldest."""
        self._missed.discard(name)
        gone = None
        if name not in self.titles and len(self.titles) >= self.most:
            gone = next((one for one in self.titles if one in self._missed), next(iter(self.titles)))
            self.forget(gone)
        self.titles[name] = title
        return gone

    def miss(self, name: str) -> None:
        """Forget a name that the server lacks at two looks in a row; at the first one it may still be loading."""
        if name in self._missed:
            self.forget(name)
        else:
            self._missed.add(name)

    def forget(self, name: str) -> None:
        """Forget a name, if it is known."""
        self.titles.pop(name, None)
        self._missed.discard(name)


def describe_base(place: Path | str) -> Mapping[str, Any] | None:
    """Return the configuration of a base in a folder, ``None`` for one on a hub.

    Raises:
        RefusedAdapter: The folder has none that can be read.
    """
    if not isinstance(place, Path):
        return None
    described = read_base_config(place)
    if described is None:
        raise RefusedAdapter(f"The config.json of the served base in {place} is missing or not a JSON object.")
    return described


def _list_messages(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    """Return the texts of the registry's warnings; the others are those of libraries, about their own use."""
    return tuple(dict.fromkeys(str(one.message) for one in caught if hasattr(one.message, "says_it_all")))
