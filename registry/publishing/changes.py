"""Which files of a repository are a release's, and what a push changes.

A push writes the files of its release and removes those of the release before; everything else in the repository
belongs to others and stays as it is.
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

__all__ = ["Changes", "Draft", "Head", "Published", "check_repository", "manifest_at", "plan_changes", "read_head"]

#: Bytes of a README or of a model's configuration that are looked at.
_SMALL = 4 * 1024 * 1024
_SHOWN = 5
_WEIGHTS = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"})
#: What Trainers leave beside an adapter: the first words of their names.
_TRAINING_STATE = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")
_INDEXES = (".bin.index.json", ".safetensors.index.json")
#: Keys by which the configuration of a model is known: transformers, timm, diffusers.
_MODEL_KEYS = frozenset({"_class_name", "architecture", "architectures", "model_type"})
_MODEL_CONFIGS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class Draft:
    """A release that is not published yet.

    Attributes:
        manifest: Its manifest.
        files: Its other files with their content.
        fixed: Whether its bytes are those of another registry, so that the card can't be put elsewhere.
        signer: Signs its manifest, as it is when the files are written.
    """

    manifest: Manifest
    files: Mapping[str, Path | bytes]
    fixed: bool = False
    signer: Callable[[Manifest], bytes] | None = None

    def all_files(self) -> dict[str, Path | bytes]:
        """The files with the manifest, and its signature if it is signed."""
        signed = {} if self.signer is None else {SIGNATURE_FILE: self.signer(self.manifest)}
        return {**self.files, MANIFEST_FILE: self.manifest.to_bytes(), **signed}


@dataclass(frozen=True)
class Changes:
    """What a push does to the files of a branch, by path.

    Attributes:
        written: Files that are new.
        replaced: Files of the release before, which get the content of this one.
        deleted: Files of the release before that this one doesn't have.
        overwritten: Files of others that the release replaces, because the caller insists (``force=True``).
        left: Files of others, which stay as they are.
    """

    written: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """Result of a push.

    Attributes:
        name: ``org/name``.
        version: The version.
        commit: Commit holding the release; for a change request and a dry run the one that it starts from, which is
            empty where there is no repository yet.
        manifest: Of the release.
        created: Whether it was published now; otherwise the same content had been before, or it is a dry run.
        url: The change request, if that is what was made.
        changes: What happened to the files of the repository, or would happen; ``None`` where nothing was published.
        dry_run: Whether it was only looked at.
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
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Head:
    """The files of one commit, told apart by who put them there.

    Attributes:
        commit: Its id.
        manifest: Of the release that it holds; ``None`` if there is none.
        own: Files that this release put there.
        foreign: The others, with their sizes.
        readme: Its ``README.md``, whoever wrote it; ``None`` if there is none, or one too large for a card.
    """

    commit: str = ""
    manifest: Manifest | None = None
    own: frozenset[str] = frozenset()
    foreign: Mapping[str, int] = field(default_factory=dict)
    readme: bytes | None = None


def manifest_at(hub: Hub, name: str, commit: str) -> Manifest | None:
    """The manifest in a commit; ``None`` if there is none that can be read."""
    try:
        return Manifest.parse(hub.read(name, commit, MANIFEST_FILE, MAX_MANIFEST))
    except (HubFileNotFound, InvalidManifest):
        return None


def read_head(hub: Hub, name: str, commit: str, published: Container[str]) -> Head:
    """Tell the files of a commit apart.

    Args:
        hub: Where it is.
        name: ``org/name``.
        commit: Its id.
        published: Commits of releases. In one of these, what the manifest lists is as it was published; in any other,
            somebody may have changed it since, so its content is compared.
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
    """Fit a release into what is there.

    Returns:
        The release with its card where it belongs in this repository, and what publishing it changes.

    Raises:
        RepositoryConflict: Others' files have the names of its files, and the caller doesn't insist.
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

    What tells a base model, in any folder of the repository: an index of weight files; or the configuration of a model
    and weights. Trainers leave a base's configuration and their own state beside an adapter, so where there is an
    adapter's configuration, only weights that are called a model's count.

    Raises:
        RepositoryConflict: It holds one; the message names its files.
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
    """The files of one folder that make it a base model's."""
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
    """Put the card into the README that is there, or beside it."""
    card = draft.files.get(CARD)
    if not isinstance(card, bytes) or (CARD not in head.own and CARD not in head.foreign):
        return draft
    merged = None if head.readme is None else merge_readme(head.readme, card)
    if merged is None and CARD in head.own:
        return draft  # it was generated, and not changed since
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
    """A file that keeps nothing of what is written to it but its hash."""

    def __init__(self) -> None:
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = 0) -> int:
        """Only to the start: a download that goes on elsewhere begins anew."""
        if offset != 0 or whence != 0:
            raise ValueError("a hash can only begin anew")
        self.__init__()  # type: ignore[misc]
        return 0

    def truncate(self, size: int | None = None) -> int:
        return self._size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
