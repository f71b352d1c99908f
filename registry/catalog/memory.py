"""Remember what was seen of a repository, to detect a rollback.

A hub can be rolled back to an earlier state, or be made to hide its newest releases. A client that used it before can
detect this: it remembers every version with its commit, and every state of withdrawn versions and aliases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from registry.catalog.index import Release
from registry.catalog.state import State
from registry.formats.fields import COMMIT, SHA256, Fields
from registry.formats.strict_json import canonical, parse

__all__ = ["MAX_RECORD", "Pulled", "Seen", "find_lost_state", "find_lost_tags", "parse_record", "write_record"]

MAX_RECORD = 64 * 1024 * 1024
_FORMAT = 1
_MOST = 1_000_000
#: States that are remembered by their commit.
_MOST_STATES = 1000


@dataclass(frozen=True)
class Pulled:
    """The commit and the manifest digest of a version when it was first pulled."""

    commit: str
    manifest: str


@dataclass(frozen=True)
class Seen:
    """What is remembered of a repository.

    Attributes:
        identity: The hub's id for it.
        versions: The versions that were pulled.
        tags: Every version tag that was seen, with its commit.
        state: Withdrawn versions and aliases.
        state_commit: The commit that holds this state.
        former_states: The commits of earlier states, oldest first.
        plain: The unversioned adapters that were pulled, by commit, or by commit and folder (``<commit>/folder``).
    """

    identity: str | None = None
    versions: Mapping[str, Pulled] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    state: State = field(default_factory=State)
    state_commit: str | None = None
    former_states: tuple[str, ...] = ()
    plain: Mapping[str, Pulled] = field(default_factory=dict)

    def find(self, release: Release) -> Pulled | None:
        """Return what is remembered of a release or of an unversioned adapter."""
        if release.unversioned:
            return self.plain.get(release.path_at_commit)
        return self.versions.get(release.version)

    def with_pulled(self, release: Release, manifest: str) -> Seen:
        """Return the record with one more pull, given the digest of the manifest."""
        pulled = Pulled(release.commit, manifest)
        if release.unversioned:
            return replace(self, plain={**self.plain, release.path_at_commit: pulled})
        return replace(self, versions={**self.versions, release.version: pulled})

    def with_tags(self, tags: Mapping[str, str]) -> Seen:
        """Return the record with tags added; none is removed."""
        return replace(self, tags={**self.tags, **tags})

    def with_state(self, state: State, commit: str | None) -> Seen:
        """Return the record with a newer state; a state that is already superseded changes nothing."""
        if commit == self.state_commit or commit in self.former_states:
            return self
        former = self.former_states if self.state_commit is None else (*self.former_states, self.state_commit)
        return replace(self, state=state, state_commit=commit, former_states=former[-_MOST_STATES:])


def parse_record(data: bytes) -> Seen:
    """Parse a record. A damaged record is refused as a whole, because its losses would go unnoticed.

    Raises:
        JsonRefused: The record is damaged.
        HostileAnswer: The state in it is malformed.
    """
    fields = Fields(parse(data, MAX_RECORD))
    fields.integer("format", _FORMAT, least=1)
    commits = fields.json_table("tags")
    if len(commits) > _MOST or not all(isinstance(c, str) and COMMIT.fullmatch(c) for c in commits.values()):
        raise fields.refuse("tags", "commits by tag")
    former = fields.optional("former_states", fields.texts) or ()
    if not all(COMMIT.fullmatch(commit) for commit in former):
        raise fields.refuse("former_states", "a list of commits")
    return Seen(
        identity=fields.optional("identity", fields.text),
        versions=_read_pulled(fields, "versions"),
        plain=_read_pulled(fields, "plain"),
        tags=commits,
        state=State.parse(json.dumps(fields.json_table("state")).encode()) if fields.has("state") else State(),
        state_commit=fields.optional("state_commit", lambda key: fields.text(key, COMMIT)),
        former_states=former,
    )


def _read_pulled(fields: Fields, key: str) -> dict[str, Pulled]:
    return {
        name: Pulled(entry.text("commit", COMMIT), entry.text("manifest", SHA256))
        for name, entry in fields.table(key, _MOST)
    }


def write_record(seen: Seen) -> bytes:
    """Return a record as the bytes of its file."""
    return canonical(
        {
            "format": _FORMAT,
            "identity": seen.identity,
            "versions": {version: asdict(pulled) for version, pulled in seen.versions.items()},
            "plain": {place: asdict(pulled) for place, pulled in seen.plain.items()},
            "tags": dict(seen.tags),
            "state_commit": seen.state_commit,
            "former_states": list(seen.former_states),
            "state": json.loads(seen.state.to_bytes()),
        }
    )


def find_lost_tags(seen: Seen, tags: Mapping[str, str]) -> dict[str, str | None]:
    """Return the remembered tags that moved or vanished, each with its commit now, or ``None``."""
    return {tag: tags.get(tag) for tag, commit in seen.tags.items() if tags.get(tag) != commit}


def find_lost_state(seen: Seen, state: State, commit: str | None) -> list[str]:
    """Return what a newly read state lost compared with the remembered one, one clause each; empty if nothing."""
    if seen.state_commit is None:
        return []
    found = []
    for alias, moves in seen.state.aliases.items():
        if tuple(state.aliases.get(alias, ()))[: len(moves)] != tuple(moves):
            found.append(f"the history of the alias {alias}")
    older = not state.stored or commit in seen.former_states or 0 < state.serial < seen.state.serial
    if older or found:
        offered = sorted(set(seen.state.yanked) - set(state.yanked))
        found = [*(f"the withdrawal of {version}" for version in offered), *found]
        return found or [f"the changes between {commit or 'the start'} and {seen.state_commit}"]
    return []
