"""List adapters and versions, and show their manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from registry.catalog.index import Release, read_index, read_manifest
from registry.errors import HubUnavailable, MachineError, RegistryError
from registry.formats.manifest import Manifest
from registry.formats.references import Reference, check_name
from registry.hubs import open_hub
from registry.hubs.http.deadline import OPERATION, Deadline, limit_operation
from registry.hubs.protocol import Hub

__all__ = ["Described", "foreign_tags", "list_adapters", "show", "versions"]


@dataclass(frozen=True)
class Described:
    """A release with its manifest; its files are not downloaded."""

    release: Release
    manifest: Manifest

    @property
    def name(self) -> str:
        """``org/name``."""
        return self.release.name

    @property
    def version(self) -> str:
        """The version."""
        return self.release.version

    def matches(self, search: str) -> bool:
        """Whether all words of a search are in name, base, aliases, tags, note or task."""
        release, task = self.release, self.manifest.config.get("task_type")
        texts = (release.name, self.manifest.base.id, *release.aliases, *release.tags, release.note, task)
        told = "\n".join(str(text) for text in texts if text).lower()
        return all(word in told for word in search.lower().split())


def versions(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> list[Release]:
    """Return all releases of an adapter, oldest version first; withdrawn ones are included, foreign tags are not.

    Raises:
        RepositoryNotFound: There is no such adapter.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        return read_index(place, check_name(name)).releases()


def foreign_tags(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> dict[str, str]:
    """Return the version tags of a repository whose commits hold no release, with these commits.

    Raises:
        RepositoryNotFound: There is no such adapter.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        return read_index(place, check_name(name)).foreign_tags()


def show(
    reference: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> Described:
    """Return a release and its manifest; the manifest of an unversioned adapter is made from what its commit holds.

    Raises:
        VersionNotFound: No release matches the reference.
    """
    place, parsed, token = open_hub(hub, token), Reference.parse(reference), None
    with limit_operation():
        index = read_index(place, parsed.name)
        release = index.resolve(parsed, unversioned=True)
        return Described(release, read_manifest(place, release, index.manifests))


def list_adapters(
    base: str | None = None,
    *,
    search: str | None = None,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Iterator[Described]:
    """Yield the newest stable release of each adapter in a registry.

    Args:
        base: Id of a base model; only its adapters are listed.
        search: Words that must all be in name, base, aliases, tags, note or task; upper and lower case are the same.
        hub: The registry.
        token: For the registry.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        names = list(place.names(base))
    patience = Deadline(OPERATION)
    for name in names:
        found = _find_newest(place, name)
        if found is not None and (base is None or found.manifest.base.id == base):
            if search is None or found.matches(search):
                yield found
            patience = Deadline(OPERATION)
        elif patience.passed:
            raise HubUnavailable(f"The list of {place.location} has brought no adapter for {OPERATION:.0f} seconds")


def _find_newest(place: Hub, name: str) -> Described | None:
    try:
        with limit_operation():
            index = read_index(place, check_name(name))
            release = index.newest()
            return None if release is None else Described(release, read_manifest(place, release, index.manifests))
    except (HubUnavailable, MachineError):
        raise
    except RegistryError:
        return None  # a foreign repository, or one deleted meanwhile
