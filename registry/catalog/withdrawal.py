"""Yank or unyank a version.

Ranges skip a yanked version; exact pins and locks still resolve to it, with a warning.
"""

from __future__ import annotations

import os
from dataclasses import replace

from registry.catalog.index import Manifests, Release, index_of, read_index
from registry.catalog.state import State, Yank, change_state, check_reason, now
from registry.errors import InvalidReference
from registry.formats.references import Reference
from registry.hubs import open_hub
from registry.hubs.protocol import Hub, Refs

__all__ = ["unyank", "yank"]


def yank(
    reference: str,
    reason: str,
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Release:
    """Withdraw a version.

    Args:
        reference: ``org/name@version`` (or an alias, or a commit).
        reason: One line, shown to everyone who uses the version.
        hub: The registry.
        token: For the registry.

    Raises:
        InvalidReference: The reference may match several releases, or the reason is not one line of text.
        VersionNotFound: There is no such release.
    """
    # Printers of tracebacks show the variables of a frame: it holds no token while the hub is asked.
    place, token = open_hub(hub, token), None
    return _change(reference, Yank(check_reason(reason), now()), place)


def unyank(
    reference: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> Release:
    """Undo the withdrawal of a version.

    Raises:
        VersionNotFound: There is no such release.
    """
    place, token = open_hub(hub, token), None
    return _change(reference, None, place)


def _change(reference: str, yanked: Yank | None, hub: Hub) -> Release:
    parsed = Reference.parse(reference)
    if parsed.range is not None or parsed.bare:
        raise InvalidReference(f"{reference!r} may mean several versions: name one, as {parsed.name}@1.2.0")

    manifests = Manifests(hub, parsed.name)

    def change(state: State, refs: Refs) -> State:
        version = index_of(parsed.name, refs, state, manifests).resolve(parsed).version
        others = {known: yank for known, yank in state.yanked.items() if known != version}
        if yanked is None:
            return replace(state, yanked=others)
        standing = state.yanked.get(version)
        if standing is not None and standing.reason == yanked.reason:
            return state
        return replace(state, yanked={**others, version: yanked})

    change_state(hub, parsed.name, change, f"{'Withdraw' if yanked else 'Offer again'} {parsed}")
    return read_index(hub, parsed.name).resolve(parsed)
