"""State of a repository: withdrawn versions, and aliases with history.

The state is one file, ``registry.json``, on its own branch, changed by compare-and-swap.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from registry.errors import HostileAnswer, HubFileNotFound, InvalidReference, PublishConflict
from registry.formats.fields import Fields
from registry.formats.paths import GIT_ATTRIBUTES
from registry.formats.references import check_alias, parse_version, version_text, versions_in
from registry.formats.strict_json import JsonRefused, canonical, parse, shown
from registry.hubs.protocol import MAIN, Conflict, Hub, Refs

__all__ = [
    "STATE_BRANCH",
    "STATE_FILE",
    "Move",
    "Note",
    "State",
    "Yank",
    "change_state",
    "check_reason",
    "check_tag",
    "now",
    "read_state",
]

#: Branch and file that hold the state of a repository.
STATE_BRANCH = "registry"
STATE_FILE = "registry.json"
_FORMAT = 1
_LIMIT = 16 * 1024 * 1024
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_MOST = 100_000
_LONGEST_REASON = 500
_TAG = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_MOST_TAGS = 64
#: Attempts to change the state while others change it.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Yank:
    """Why and when a version was withdrawn."""

    reason: str
    time: str


@dataclass(frozen=True)
class Note:
    """What somebody says of a version, and since when."""

    text: str
    time: str


@dataclass(frozen=True)
class Move:
    """One change of an alias: from ``time`` on it points to ``version``; ``None`` if it was removed."""

    version: str | None
    time: str


@dataclass(frozen=True)
class State:
    """Withdrawn versions, the moves of each alias, oldest first, and notes and tags by version.

    ``serial`` counts the changes and so identifies an earlier state; 0 if they were not counted. ``stored`` is false if
    no file holds the state because nothing has changed yet.
    """

    yanked: Mapping[str, Yank] = field(default_factory=dict)
    aliases: Mapping[str, tuple[Move, ...]] = field(default_factory=dict)
    serial: int = field(default=0, compare=False)
    stored: bool = field(default=True, compare=False)
    notes: Mapping[str, Note] = field(default_factory=dict)
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> State:
        """Parse ``registry.json``.

        Raises:
            HostileAnswer: It is malformed, or of a newer format.
        """
        try:
            fields = Fields(parse(data, _LIMIT))
            if fields.integer("format", 2**31, least=1) > _FORMAT:
                raise fields.refuse("format", f"at most {_FORMAT}; a newer lora-plugins wrote it, and can read it")
            yanked = {
                version_text(parse_version(version)): Yank(_read_reason(entry), entry.text("time", _TIME, "a time"))
                for version, entry in fields.table("yanked", _MOST)
            }
            serial = fields.integer("serial", 2**53) if fields.has("serial") else 0
            aliases = {
                check_alias(alias): tuple(_read_moves(alias, moves))
                for alias, moves in fields.json_table("aliases").items()
            }
            notes = {
                version_text(parse_version(version)): Note(
                    check_reason(entry.text("text")), entry.text("time", _TIME, "a time")
                )
                for version, entry in fields.table("notes", _MOST)
            }
            tags = {
                version_text(parse_version(version)): _read_tags(version, found)
                for version, found in fields.json_table("tags").items()
            }
        except (JsonRefused, InvalidReference) as reason:
            raise HostileAnswer(f"{STATE_FILE}: {reason}") from None
        return cls(yanked, aliases, serial, notes=notes, tags=tags)

    def to_bytes(self) -> bytes:
        """Return the state as the bytes of its file."""
        return canonical(
            {
                "format": _FORMAT,
                "serial": self.serial,
                "yanked": {
                    version: {"reason": yank.reason, "time": yank.time} for version, yank in self.yanked.items()
                },
                "aliases": {
                    alias: [{"version": move.version, "time": move.time} for move in moves]
                    for alias, moves in self.aliases.items()
                },
                **self._write_notes(),
            }
        )

    def _write_notes(self) -> dict[str, object]:
        """Return notes and tags; without any, the file is as releases wrote it that do not know them."""
        notes = {version: {"text": note.text, "time": note.time} for version, note in self.notes.items()}
        tags = {version: list(found) for version, found in self.tags.items()}
        return {**({"notes": notes} if notes else {}), **({"tags": tags} if tags else {})}

    def version_of(self, alias: str) -> str | None:
        """Return the version that an alias points to."""
        moves = self.aliases.get(alias)
        return moves[-1].version if moves else None

    def aliases_of(self, version: str) -> tuple[str, ...]:
        """Return the aliases of a version."""
        return tuple(sorted(alias for alias in self.aliases if self.version_of(alias) == version))


def read_state(hub: Hub, name: str, refs: Refs) -> State:
    """Read the state of a repository at ``refs``."""
    commit = refs.branches.get(STATE_BRANCH)
    if commit is None or _is_fresh(refs, commit):
        return State(stored=False)
    try:
        return State.parse(hub.read(name, commit, STATE_FILE, _LIMIT))
    except HubFileNotFound:
        return State(stored=False)  # the branch was started from main and has no state yet


def change_state(hub: Hub, name: str, change: Callable[[State, Refs], State], message: str) -> State:
    """Change the state, and retry while others change it concurrently.

    Args:
        hub: The hub of the repository.
        name: ``org/name``.
        change: Returns the new state for the old one; may be called several times, and may raise to give up.
        message: Commit message.

    Raises:
        PublishConflict: Others changed it during every attempt.
    """
    for attempt in range(_ATTEMPTS):
        refs = hub.refs(name)
        before = read_state(hub, name, refs)
        after = change(before, refs)
        if after == before:
            return before
        if STATE_BRANCH not in refs.branches:
            hub.create_branch(name, STATE_BRANCH, refs.branches[MAIN])
            continue  # another process may have created it and committed to it
        after = replace(after, serial=before.serial + 1)
        parent = refs.branches[STATE_BRANCH]
        # A new branch holds copies of the files on main. Files committed later belong to others.
        inherited = hub.files(name, parent) if _is_fresh(refs, parent) else ()
        others = tuple(path for path in inherited if path not in (STATE_FILE, GIT_ATTRIBUTES))
        try:
            made = hub.commit(
                name, STATE_BRANCH, {STATE_FILE: after.to_bytes()}, parent=parent, message=message, delete=others
            )
        except Conflict:
            made = None
        # Some hubs do not compare the parent, so the branch is read again.
        if made is not None and hub.refs(name).branches.get(STATE_BRANCH) == made:
            return after
        time.sleep(random.uniform(0, 0.05 * (attempt + 1)))  # noqa: S311 - spreads attempts, protects nothing
    raise PublishConflict(f"{name}: others changed {STATE_FILE} at the same time, {_ATTEMPTS} times; try again")


def _is_fresh(refs: Refs, commit: str) -> bool:
    """Whether nothing has been committed to the state branch since it was created."""
    return commit == refs.branches.get(MAIN) or bool(versions_in(t for t, at in refs.tags.items() if at == commit))


def now() -> str:
    """Return the current time in the format of manifests and states."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_reason(reason: str) -> str:
    """Return ``reason`` if it is valid.

    Raises:
        InvalidReference: It is empty, too long, or has control characters.
    """
    if not 0 < len(reason) <= _LONGEST_REASON or not reason.isprintable():
        raise InvalidReference(f"A reason is one line of 1 to {_LONGEST_REASON} printable characters")
    return reason


def check_tag(tag: str) -> str:
    """Return a tag of a version if it is valid.

    Raises:
        InvalidReference: It is not.
    """
    if _TAG.fullmatch(tag) is None:
        raise InvalidReference(
            f"{tag[:100]!r} is not a valid tag: it must be 1 to 64 lower-case letters, digits, '.', '_' and '-', with "
            "a letter or a digit at both ends"
        )
    return tag


def _read_tags(version: str, found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or len(found) > _MOST_TAGS or not all(isinstance(tag, str) for tag in found):
        raise JsonRefused(f"the tags of {shown(version)} are not a list of at most {_MOST_TAGS} texts")
    return tuple(check_tag(tag) for tag in found)


def _read_reason(entry: Fields) -> str:
    return check_reason(entry.text("reason"))


def _read_moves(alias: str, moves: object) -> list[Move]:
    if not isinstance(moves, list) or len(moves) > _MOST:
        raise JsonRefused(f"the moves of {alias} are not a list")
    found = []
    for item in moves:
        entry = Fields(item, f"aliases.{alias}")
        version = entry.optional("version", entry.text)
        found.append(Move(version and version_text(parse_version(version)), entry.text("time", _TIME, "a time")))
    return found
