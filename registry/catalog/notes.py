"""Notes and tags on versions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from registry.catalog.index import Manifests, Release, index_of, read_index
from registry.catalog.state import Note, State, change_state, check_reason, check_tag, now
from registry.errors import InvalidReference
from registry.formats.references import Reference
from registry.hubs import open_hub
from registry.hubs.protocol import Hub, Refs

__all__ = ["annotate"]

_MOST_TAGS = 64


def annotate(
    reference: str,
    note: str | None = None,
    *,
    add_tags: Sequence[str] = (),
    remove_tags: Sequence[str] = (),
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Release:
    """Set the note of a version and change its tags. The release itself stays as it is.

    Args:
        reference: ``org/name@version`` (or an alias, or a commit).
        note: One line; an empty text removes the note, ``None`` leaves it.
        add_tags: Tags to add, such as ``"reviewed"``.
        remove_tags: Tags to remove; those that are not there are ignored.
        hub: The registry.
        token: For the registry.

    Raises:
        InvalidReference: The reference may match several releases, or a note or tag is malformed.
        VersionNotFound: There is no such release.
        PublishConflict: Others changed the state of the repository during every attempt.
    """
    parsed = Reference.parse(reference)
    if parsed.range is not None or parsed.bare:
        raise InvalidReference(f"{reference!r} may mean several versions: name one, as {parsed.name}@1.2.0")
    if note:
        check_reason(note)
    for tag in (*add_tags, *remove_tags):
        check_tag(tag)
    place, token = open_hub(hub, token), None
    manifests = Manifests(place, parsed.name)

    def change(state: State, refs: Refs) -> State:
        version = index_of(parsed.name, refs, state, manifests).resolve(parsed).version
        return _change(state, version, note, add_tags, remove_tags)

    change_state(place, parsed.name, change, f"Note on {parsed}")
    return read_index(place, parsed.name).resolve(parsed)


def _change(state: State, version: str, note: str | None, add_tags: Sequence[str], remove_tags: Sequence[str]) -> State:
    notes, standing = dict(state.notes), state.notes.get(version)
    if note == "":
        notes.pop(version, None)
    elif note is not None and (standing is None or standing.text != note):
        notes[version] = Note(note, now())
    kept = tuple(sorted({*state.tags.get(version, ()), *add_tags} - set(remove_tags)))
    if len(kept) > _MOST_TAGS:
        raise InvalidReference(f"{version} would have {len(kept)} tags, and may have {_MOST_TAGS}")
    tags = {known: found for known, found in state.tags.items() if known != version}
    return replace(state, notes=notes, tags={**tags, version: kept} if kept else tags)
