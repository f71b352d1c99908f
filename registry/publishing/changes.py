"""Decide which files of a repository a push changes.

A push writes the files of its release and removes those of the previous release; all other files in the repository
are foreign and left unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from registry.errors import HostileAnswer, HubFileNotFound, InvalidManifest, RepositoryConflict
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.paths import ADAPTER_CONFIG, CARD, CARD_BESIDE, GIT_ATTRIBUTES, SIGNATURE_FILE
from registry.formats.readme import merge_readme
from registry.formats.records import FileRecord
from registry.formats.strict_json import JsonRefused, parse, shown
from registry.hubs.protocol import Hub
from registry.text import html_table

__all__ = ["Changes", "Draft", "Head", "Published", "check_repository", "manifest_at", "plan_changes", "read_head"]

#: Maximum bytes read of a README or a model's configuration.
_SMALL = 4 * 1024 * 1024
_SHOWN = 5
_WEIGHTS = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"})
#: Name prefixes of the state files that Trainers write beside an adapter.
_TRAINING_STATE = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")
_INDEXES = (".bin.index.json", ".safetensors.index.json")
#: Keys that identify a model's configuration: transformers, timm, diffusers.
_MODEL_KEYS = frozenset({"_class_name", "architecture", "architectures", "model_type"})
_MODEL_CONFIGS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class Draft:
    """A release that is not published yet.

    Attributes:
        manifest: Its manifest.
        files: Its other files with their content.
        fixed: Whether it is a copy from another registry, so that the card cannot be placed elsewhere.
        signer: Signs the final manifest when the files are written.
    """

    manifest: Manifest
    files: Mapping[str, Path | bytes]
    fixed: bool = False
    signer: Callable[[Manifest], bytes] | None = None

    def all_files(self) -> dict[str, Path | bytes]:
        """Return the files with the manifest, and its signature if it is signed."""
        signed = {} if self.signer is None else {SIGNATURE_FILE: self.signer(self.manifest)}
        return {**self.files, MANIFEST_FILE: self.manifest.to_bytes(), **signed}


@dataclass(frozen=True)
class Changes:
    """What a push does to the files of a branch, by path.

    Attributes:
        written: New files.
        replaced: Existing files that get this release's content, such as those of the previous release.
        deleted: Files of the previous release that this one does not have.
        overwritten: Foreign files that the release replaces because of ``force=True``.
        left: Foreign files, which are left unchanged.
    """

    written: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Published:
    """Result of a push.

    Attributes:
        name: ``org/name``.
        version: The version.
        commit: Commit holding the release; for a change request or a dry run its parent commit, empty if the
            repository does not exist yet.
        manifest: Manifest of the release.
        created: Whether it was published now; false if the same content had been published before, or for a dry run.
        url: Address of the change request, if one was opened.
        changes: Changes to the files of the repository, made or planned; ``None`` if nothing was published.
        dry_run: Whether nothing was changed on purpose.
    """

    name: str
    version: str
    commit: str
    manifest: Manifest
    created: bool = True
    url: str | None = None
    changes: Changes | None = None
    dry_run: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.commit if self.manifest.unversioned else self.version}"

    def __repr__(self) -> str:
        return f"<Published {self}, {self._describe()}>"

    def _repr_html_(self) -> str:
        rows = (("state", self._describe()), ("commit", self.commit), ("address", self.url))
        return html_table(str(self), (*rows, *self.manifest.list_facts()))

    def _describe(self) -> str:
        if self.dry_run:
            return "dry run"
        return "published" if self.created else "had been published before"


@dataclass(frozen=True)
class Head:
    """The files of one commit, divided into the release's own and foreign ones.

    Attributes:
        commit: Its id.
        manifest: Manifest of the release that it holds; ``None`` if there is none.
        own: Files of this release.
        foreign: All other files, with their sizes.
        readme: Its ``README.md``, own or foreign; ``None`` if there is none, or it is too large.
    """

    commit: str = ""
    manifest: Manifest | None = None
    own: frozenset[str] = frozenset()
    foreign: Mapping[str, int] = field(default_factory=dict)
    readme: bytes | None = None


def manifest_at(hub: Hub, name: str, commit: str) -> Manifest | None:
    """Return the manifest in a commit; ``None`` if it is missing or malformed."""
    try:
        return Manifest.parse(hub.read(name, commit, MANIFEST_FILE, MAX_MANIFEST))
    except (HubFileNotFound, InvalidManifest):
        return None


def read_head(hub: Hub, name: str, commit: str, published: Container[str]) -> Head:
    """Divide the files of a commit into own and foreign ones.

    Args:
        hub: The hub of the repository.
        name: ``org/name``.
        commit: Its id.
        published: Commits of releases. In these, the files in the manifest are unchanged; in other commits they may
            have been changed, so their content is compared.
    """
    files = {path: size for path, size in hub.files(name, commit).items() if path != GIT_ATTRIBUTES}
    manifest = manifest_at(hub, name, commit) if MANIFEST_FILE in files else None
    own = set()
    if manifest is not None:
        listed = {path: record for path, record in manifest.files.items() if path in files}
        own = ({MANIFEST_FILE, SIGNATURE_FILE} & set(files)) | {
            path
            for path, record in listed.items()
            if commit in published or (files[path] == record.size and _holds(hub, name, commit, path, record))
        }
    readme = _read_small(hub, name, commit, CARD) if CARD in files else None
    foreign = {path: size for path, size in files.items() if path not in own}
    return Head(commit, manifest, frozenset(own), foreign, readme)


def plan_changes(hub: Hub, name: str, draft: Draft, head: Head, *, force: bool) -> tuple[Draft, Changes]:
    """Plan how a release changes the files of a commit.

    Returns:
        The release with its card placed for this repository, and the changes.

    Raises:
        RepositoryConflict: Foreign files have the names of its files, and ``force`` is false.
    """
    placed = draft if draft.fixed else _place_card(draft, head)
    files = placed.all_files()
    edited = {CARD} if placed is not draft and CARD in files else set()
    taken = [path for path in files if path in head.foreign and path not in edited]
    standing = [path for path in taken if not _is_same(hub, name, head, path, files[path])]
    if standing and not force:
        raise RepositoryConflict(
            f"{name} holds {_list(standing)}, which no release put there, and the release has files of the same names. "
            "Publish into a repository of its own, or move them; to replace them, pass force=True (--force)"
        )
    there = {*head.own, *head.foreign}
    return placed, Changes(
        written=tuple(sorted(set(files) - there)),
        replaced=tuple(sorted(path for path in files if path in there and path not in standing)),
        deleted=tuple(sorted(head.own - set(files))),
        overwritten=tuple(sorted(standing)),
        left=tuple(sorted(set(head.foreign) - set(files))),
    )


def check_repository(hub: Hub, name: str, head: Head) -> None:
    """Refuse a repository that holds a base model and no release.

    A folder of the repository holds a base model if it has an index of weight files, or a model's configuration and
    weights. Trainers leave a base's configuration and their own state beside an adapter, so beside an adapter's
    configuration only weights named like a model's count.

    Raises:
        RepositoryConflict: It holds a base model; the message names its files.
    """
    if head.manifest is not None:
        return
    folders: dict[str, list[str]] = {}
    for path in sorted(head.foreign):
        folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
    for files in folders.values():
        found = _find_base(hub, name, head.commit, files)
        if found:
            raise RepositoryConflict(
                f"{name} holds a base model: {_list(found)}. An adapter is published into a repository of its own, for "
                f"example {name}-lora. If it is meant to stand beside the model, pass force=True (--force): the files "
                "of the model stay as they are"
            )


def _find_base(hub: Hub, name: str, commit: str, files: Iterable[str]) -> list[str]:
    """Return the files of a folder that identify a base model; empty if there is none."""
    names = {path: PurePosixPath(path).name for path in files}
    adapter = ADAPTER_CONFIG in names.values()
    weights = [path for path, file in names.items() if _is_model_weight(file, beside_adapter=adapter)]
    indexes = [path for path, file in names.items() if file.endswith(_INDEXES) and not file.startswith("adapter_")]
    if indexes:
        return [*indexes, *weights]
    configs = [path for path, file in names.items() if file in _MODEL_CONFIGS]
    found = [path for path in configs if weights and _is_model_config(hub, name, commit, path)]
    return [*found, *weights] if found else []


def _is_model_weight(file: str, *, beside_adapter: bool) -> bool:
    if PurePosixPath(file).suffix.lower() not in _WEIGHTS or file.startswith(("adapter_model", *_TRAINING_STATE)):
        return False
    return not beside_adapter or "model" in file or "consolidated" in file


def _is_model_config(hub: Hub, name: str, commit: str, path: str) -> bool:
    content = _read_small(hub, name, commit, path)
    if content is None:
        return True  # larger than any adapter's
    try:
        values = parse(content, _SMALL)
    except JsonRefused:
        return False
    return isinstance(values, dict) and not _MODEL_KEYS.isdisjoint(values)


def _place_card(draft: Draft, head: Head) -> Draft:
    """Merge the card into the existing README, or place it beside that."""
    card = draft.files.get(CARD)
    if not isinstance(card, bytes) or (CARD not in head.own and CARD not in head.foreign):
        return draft
    merged = None if head.readme is None else merge_readme(head.readme, card)
    if merged is None and CARD in head.own:
        return draft  # a generated README without edits
    place, content = (CARD_BESIDE, card) if merged is None else (CARD, merged)
    files = {**{path: file for path, file in draft.files.items() if path != CARD}, place: content}
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    records = {**{path: known for path, known in draft.manifest.files.items() if path != CARD}, place: record}
    return replace(draft, manifest=replace(draft.manifest, files=records), files=files)


def _is_same(hub: Hub, name: str, head: Head, path: str, content: Path | bytes) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if head.foreign[path] != len(data):
        return False
    return _holds(hub, name, head.commit, path, FileRecord(len(data), hashlib.sha256(data).hexdigest()))


def _holds(hub: Hub, name: str, commit: str, path: str, record: FileRecord) -> bool:
    sink = _Digest()
    try:
        hub.download(name, commit, path, cast("BinaryIO", sink), record.size)
    except (HubFileNotFound, HostileAnswer):
        return False
    return sink.hexdigest() == record.sha256


def _read_small(hub: Hub, name: str, commit: str, path: str) -> bytes | None:
    try:
        return hub.read(name, commit, path, _SMALL)
    except HostileAnswer:
        return None


def _list(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(shown, paths[:_SHOWN])) + more


class _Digest:
    """A file object that keeps only the hash of what is written to it."""

    def __init__(self) -> None:
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek to the start, which resets the hash; other positions are refused, so a download starts over."""
        if offset != 0 or whence != 0:
            raise ValueError("a hash can only begin anew")
        self.__init__()  # type: ignore[misc]
        return 0

    def truncate(self, size: int | None = None) -> int:
        return self._size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
