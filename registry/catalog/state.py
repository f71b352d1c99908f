"""State of a repository: withdrawn versions, and aliases with history.

It is one file, ``registry.json``, on a branch of its own, changed by compare-and-swap.
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
from registry.formats.strict_json import JsonRefused, canonical, parse
from registry.hubs.protocol import MAIN, Conflict, Hub, Refs

__all__ = ["STATE_BRANCH", "STATE_FILE", "Move", "State", "Yank", "change_state", "now", "read_state"]

#: Where the state of a repository lives.
STATE_BRANCH = "registry"
STATE_FILE = "registry.json"
_FORMAT = 1
_LIMIT = 16 * 1024 * 1024
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_MOST = 100_000
_LONGEST_REASON = 500
#: Attempts to change the state while others do, too.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Yank:
    """Why and when a version was withdrawn."""

    reason: str
    time: str


@dataclass(frozen=True)
class Move:
    """One step in the life of an alias: since ``time`` it stands for ``version``; ``None`` when it was removed."""

    version: str | None
    time: str


@dataclass(frozen=True)
class State:
    """Withdrawn versions, and the moves of each alias, oldest first.

    ``serial`` counts the changes, so that a state can be told from an earlier one; 0 where it was not counted.
    ``stored`` is false where no file holds it, because nothing was changed yet.
    """

    yanked: Mapping[str, Yank] = field(default_factory=dict)
    aliases: Mapping[str, tuple[Move, ...]] = field(default_factory=dict)
    serial: int = field(default=0, compare=False)
    stored: bool = field(default=True, compare=False)

    @classmethod
    def parse(cls, data: bytes) -> State:
        """Read ``registry.json``.

        Raises:
            HostileAnswer: It is malformed, or of a newer format.
        """
        try:
            fields = Fields(parse(data, _LIMIT))
            if fields.integer("format", 2**31, least=1) > _FORMAT:
                raise fields.refuse("format", f"at most {_FORMAT}; a newer lora-plugins wrote it, and can read it")
            yanked = {
                version_text(parse_version(version)): Yank(_reason(entry), entry.text("time", _TIME, "a time"))
                for version, entry in fields.table("yanked", _MOST)
            }
            serial = fields.integer("serial", 2**53) if fields.has("serial") else 0
            aliases = {
                check_alias(alias): tuple(_moves(alias, moves)) for alias, moves in fields.json_table("aliases").items()
            }
        except (JsonRefused, InvalidReference) as reason:
            raise HostileAnswer(f"{STATE_FILE}: {reason}") from None
        return cls(yanked, aliases, serial)

    def to_bytes(self) -> bytes:
        """The file."""
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
            }
        )

    def version_of(self, alias: str) -> str | None:
        """The version that an alias stands for."""
        moves = self.aliases.get(alias)
        return moves[-1].version if moves else None

    def aliases_of(self, version: str) -> tuple[str, ...]:
        """The aliases of a version."""
        return tuple(sorted(alias for alias in self.aliases if self.version_of(alias) == version))


def read_state(hub: Hub, name: str, refs: Refs) -> State:
    """The state of a repository at the moment of ``refs``."""
    commit = refs.branches.get(STATE_BRANCH)
    if commit is None or _is_fresh(refs, commit):
        return State(stored=False)
    try:
        return State.parse(hub.read(name, commit, STATE_FILE, _LIMIT))
    except HubFileNotFound:
        return State(stored=False)  # started from what main held before


def change_state(hub: Hub, name: str, change: Callable[[State, Refs], State], message: str) -> State:
    """Change the state, again and again until nobody else has changed it in between.

    Args:
        hub: Where the repository is.
        name: ``org/name``.
        change: Makes the new state of the old one; may be called several times, and may raise to give up.
        message: For the history of the branch.

    Raises:
        PublishConflict: Others changed it at the same time, every time.
    """
    for attempt in range(_ATTEMPTS):
        refs = hub.refs(name)
        before = read_state(hub, name, refs)
        after = change(before, refs)
        if after == before:
            return before
        if STATE_BRANCH not in refs.branches:
            hub.create_branch(name, STATE_BRANCH, refs.branches[MAIN])
            continue  # somebody else may have started it, and gone on
        after = replace(after, serial=before.serial + 1)
        parent = refs.branches[STATE_BRANCH]
        # A branch that was just started holds copies of what main holds. Anything else in it belongs to others.
        inherited = hub.files(name, parent) if _is_fresh(refs, parent) else ()
        others = tuple(path for path in inherited if path not in (STATE_FILE, GIT_ATTRIBUTES))
        try:
            made = hub.commit(
                name, STATE_BRANCH, {STATE_FILE: after.to_bytes()}, parent=parent, message=message, delete=others
            )
        except Conflict:
            made = None
        # Hubs exist that don't compare the parent: what counts is what stands there afterwards.
        if made is not None and hub.refs(name).branches.get(STATE_BRANCH) == made:
            return after
        time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
    raise PublishConflict(f"{name}: others changed {STATE_FILE} at the same time, {_ATTEMPTS} times; try again")


def _is_fresh(refs: Refs, commit: str) -> bool:
    """Whether the state's branch still stands where it was started."""
    released = {refs.tags[tag] for tag in versions_in(refs.tags).values()}
    return commit == refs.branches.get(MAIN) or commit in released


def now() -> str:
    """The time as manifests and states have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_reason(reason: str) -> str:
    """``reason``, if it can be kept and shown.

    Raises:
        InvalidReference: It is empty, too long, or has control characters.
    """
    if not 0 < len(reason) <= _LONGEST_REASON or not reason.isprintable():
        raise InvalidReference(f"A reason is one line of 1 to {_LONGEST_REASON} printable characters")
    return reason


def _reason(entry: Fields) -> str:
    return check_reason(entry.text("reason"))


def _moves(alias: str, moves: object) -> list[Move]:
    if not isinstance(moves, list) or len(moves) > _MOST:
        raise JsonRefused(f"the moves of {alias} are not a list")
    found = []
    for item in moves:
        entry = Fields(item, f"aliases.{alias}")
        version = entry.optional("version", entry.text)
        found.append(Move(version and version_text(parse_version(version)), entry.text("time", _TIME, "a time")))
    return found
