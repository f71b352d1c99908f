"""Aliases such as ``champion``: one version at a time, with history."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from packaging.version import Version

from registry.catalog.index import Index, Manifests, Release, index_of, read_index, read_manifest
from registry.catalog.metrics import find_direction
from registry.catalog.state import Move, State, change_state, now, read_state
from registry.errors import AliasMoved, AliasNotFound, InvalidReference, MetricNotFound
from registry.formats.references import Reference, check_alias, check_name, parse_version, version_text
from registry.hubs import open_hub
from registry.hubs.protocol import Hub, Refs

__all__ = ["ANY", "Comparison", "aliases", "move_alias", "move_if_better", "remove_alias", "set_alias"]

#: Attempts to move an alias to what is better while others move it.
_ATTEMPTS = 10
#: For ``expect=``: the version that the alias points to when the call begins.
ANY = "any"


@dataclass(frozen=True)
class Comparison:
    """What came of the comparison.

    Attributes:
        alias: The alias.
        release: The version it was to point to.
        standing: The version it pointed to before; ``None`` if it was new.
        metric: Name of the metric.
        better: ``"lower"`` or ``"higher"``.
        before: The metric of the standing version; ``None`` without one.
        after: The metric of the release.
        moved: Whether the alias points to the release now, and did not before.
    """

    alias: str
    release: Release
    standing: str | None
    metric: str
    better: str
    before: float | None
    after: float
    moved: bool


def set_alias(
    reference: str,
    alias: str,
    *,
    expect: str | None = ANY,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Release:
    """Point an alias at the release that a reference resolves to now.

    The alias moves only if it points to the expected version, so of two concurrent callers one gets an error.

    Args:
        reference: The release, for example ``org/name@1.2.0``.
        alias: The name.
        expect: The version that the alias must point to; ``None`` if it must be new. By default, the version that it
            points to when the call begins.
        hub: The registry.
        token: For the registry.

    Raises:
        AliasMoved: It points to another version than expected.
        InvalidReference: The alias is invalid.
        VersionNotFound: No release matches the reference.
    """
    parsed = Reference.parse(reference)
    place, token = open_hub(hub, token), None
    release = read_index(place, parsed.name).resolve(parsed)
    move_alias(place, parsed.name, check_alias(alias), release.version, expect)
    return read_index(place, parsed.name).release(parse_version(release.version))


def move_if_better(
    reference: str,
    alias: str,
    metric: str,
    *,
    better: str | None = None,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Comparison:
    """Point an alias at a release if its metric is better than that of the version which the alias points to.

    The alias moves only if it still points to the version that was compared; if somebody moves it meanwhile, the
    release is compared with the new one. A new alias is set without a comparison, and equal values leave it where it
    is.

    Args:
        reference: The release, for example ``org/name@1.2.0``.
        alias: The name.
        metric: Name of a metric in both manifests, such as ``"eval_loss"``.
        better: ``"lower"`` or ``"higher"``; by default it follows from the name (loss, perplexity, accuracy, f1, …).
        hub: The registry.
        token: For the registry.

    Raises:
        MetricNotFound: One of the releases has no such metric.
        InvalidReference: The name of the metric does not say which value is better, or the alias is invalid.
        VersionNotFound: No release matches the reference.
        AliasMoved: Others moved the alias during every attempt.
    """
    direction = find_direction(metric, better)
    place, parsed, token = open_hub(hub, token), Reference.parse(reference), None
    check_alias(alias)
    for attempt in range(_ATTEMPTS):
        found = _compare(place, parsed, alias, metric, direction)
        if not found.moved:
            return found
        try:
            move_alias(place, parsed.name, alias, found.release.version, found.standing)
        except AliasMoved:
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        return found
    raise AssertionError("unreachable")


def remove_alias(
    name: str,
    alias: str,
    *,
    expect: str | None = ANY,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> None:
    """Remove an alias; its history stays.

    Raises:
        AliasNotFound: The alias does not exist.
        AliasMoved: It points to another version than expected.
    """
    place, token = open_hub(hub, token), None
    move_alias(place, check_name(name), check_alias(alias), None, expect)


def aliases(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> Mapping[str, tuple[Move, ...]]:
    """Return all aliases of an adapter, each with the versions it pointed to, oldest first."""
    place, token = open_hub(hub, token), None
    return read_state(place, check_name(name), place.refs(name)).aliases


def move_alias(hub: Hub, name: str, alias: str, version: str | None, expect: str | None) -> None:
    """Point an alias at a version, or remove it with ``None``; see `set_alias`."""
    # Without ``expect``, the version found on the first read is the expected one.
    expected: list[str | None] = [] if expect == ANY else [_normalize(expect)]
    manifests = Manifests(hub, name)

    def change(state: State, refs: Refs) -> State:
        standing = state.version_of(alias)
        if not expected:
            expected.append(standing)
        if standing == version and (standing is not None or expected[0] is not None):
            return state
        if standing is None and version is None:
            raise AliasNotFound(f"{name} has no alias {alias}")
        if standing != expected[0]:
            raise AliasMoved(
                f"{name}@{alias} stands for {standing or 'nothing'}, not for {expected[0] or 'nothing'} as expected: "
                "somebody else has moved it"
            )
        if version is not None and not _is_there(index_of(name, refs, state, manifests), parse_version(version)):
            raise InvalidReference(f"{name} has no version {version} any more")
        moves = (*state.aliases.get(alias, ()), Move(version, now()))
        return replace(state, aliases={**state.aliases, alias: moves})

    change_state(hub, name, change, f"{alias} is {version}" if version else f"Remove {alias}")


def _is_there(index: Index, version: Version) -> bool:
    return version in index.versions and index.is_release(version)


def _normalize(expect: str | None) -> str | None:
    return None if expect is None else version_text(parse_version(expect))


def _compare(hub: Hub, reference: Reference, alias: str, metric: str, better: str) -> Comparison:
    index = read_index(hub, reference.name)
    release, standing = index.resolve(reference), index.state.version_of(alias)
    after, before = _read_metric(hub, index, release, metric), None
    moved = standing != release.version
    if standing is not None and moved:
        before = _read_metric(hub, index, index.release(parse_version(standing)), metric)
        moved = after < before if better == "lower" else after > before
    return Comparison(alias, release, standing, metric, better, before, after, moved)


def _read_metric(hub: Hub, index: Index, release: Release, metric: str) -> float:
    metrics = read_manifest(hub, release, index.manifests).metrics
    if metric not in metrics:
        known = f"it has {', '.join(sorted(metrics))}" if metrics else "it has no metrics"
        raise MetricNotFound(f"{release} has no metric {metric!r}; {known}")
    return metrics[metric]
