"""What an attack can do to a registry: a folder or a Hub on loopback, and a victim that pushes and pulls there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from hubs import FolderPlace, LoopbackPlace, Place
from releases import MODULE, draft
from safetensors.numpy import save

from registry import Adapter, pull_adapter, push_adapter
from registry.errors import RegistryError
from registry.pulling.cache import VARIABLE
from registry.testing import LoopbackHub

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "adapter_manifest.json"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
#: What a cache has of its own: folders, a file to lock, and notes on releases, of which the times change at every use.
_SKELETON = frozenset({"releases", "seen", "checked", "guard"})
_TEMPORARY = (".tmp-", "tmp-", "adapter-")

Action = Callable[[], object]


@dataclass(frozen=True)
class Attempt:
    """One input of an attack.

    Attributes:
        label: Which.
        action: What the victim does.
        refused: Whether it has to end with an error of the attack and leave nothing; else it has to return.
        writes: Whether it may write: something was accepted, and what was is checked by the action.
    """

    label: str
    action: Action
    refused: bool = True
    writes: bool = False


def refused(label: str, action: Action) -> Attempt:
    """An attempt that ends with one of the attack's errors and leaves nothing behind."""
    return Attempt(label, action)


def harmless(label: str, action: Action) -> Attempt:
    """An attempt that has no effect: the action checks that what came of it is right."""
    return Attempt(label, action, refused=False, writes=True)


@dataclass(frozen=True)
class Attack:
    """One line of the list of attacks.

    Attributes:
        number: There.
        name: What it is about.
        errors: The classes of which a refusal is one. Empty: every attempt has to be without effect.
        attempts: Plants each input on the registry of a scene and yields what the victim does then.
    """

    number: int
    name: str
    errors: tuple[type[BaseException], ...]
    attempts: Callable[[Scene], Iterator[Attempt]]

    def __str__(self) -> str:
        return f"{self.number:02}-{self.name.replace(' ', '-')}"


class Scene:
    """A registry, the folders of its victim, and an attacker who owns the registry or the machine beside it."""

    def __init__(self, place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.folder = folder
        self.patch = monkeypatch
        self.cache = Path(os.environ[VARIABLE])
        self.lock = folder / "work" / "adapters.lock"
        self._count = 0

    @property
    def kind(self) -> str:
        """``folder`` or ``loopback``."""
        return "folder" if isinstance(self.place, FolderPlace) else "loopback"

    @property
    def loopback(self) -> LoopbackHub:
        """The Hub on loopback."""
        assert isinstance(self.place, LoopbackPlace)
        return self.place.loopback

    @property
    def root(self) -> Path:
        """The folder registry."""
        assert isinstance(self.place, FolderPlace)
        return self.place.root

    def new_name(self) -> str:
        """A repository that nobody has used."""
        self._count += 1
        return f"org/a{self._count}"

    def new_folder(self) -> Path:
        """An empty folder."""
        self._count += 1
        path = self.folder / f"folder-{self._count}"
        path.mkdir()
        return path

    def fresh_machine(self) -> None:
        """Forget everything that was pulled."""
        self._count += 1
        self.cache = self.folder / f"cache-{self._count}"
        self.patch.setenv(VARIABLE, str(self.cache))

    # -- the attacker --------------------------------------------------------------------------------------------

    def write(self, name: str, files: Mapping[str, bytes | None], *, tag: str | None = None) -> str:
        """Commit files to ``main`` behind the registry's back, and let a tag stand there."""
        if isinstance(self.place, LoopbackPlace):
            if name not in self.loopback._site.store.repos:
                self.loopback.create_repo(name)
            commit = self.loopback.commit(name, files)
            if tag:
                self.loopback.move_tag(name, tag, commit)
            return commit
        self.place.hub.create(name)
        parent = self.place.hub.refs(name).branches["main"]
        content: dict[str, Path | bytes] = {path: data for path, data in files.items() if data is not None}
        gone = tuple(path for path, data in files.items() if data is None)
        commit = self.place.hub.commit(name, "main", content, parent=parent, message="m", delete=gone)
        if tag:
            self.place.move_tag(name, tag, commit)
        return commit

    def publish(
        self,
        name: str | None = None,
        *,
        version: str = "1.0.0",
        seed: int = 0,
        files: Mapping[str, bytes | None] | None = None,
        manifest: Callable[[dict[str, Any]], object] = lambda document: None,
        tensors: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish a release whose manifest fits its files, and then lies as ``manifest`` makes it; its name.

        Args:
            name: The repository.
            version: Of the release.
            seed: Of the values.
            files: In place of the usual ones.
            manifest: Changes the document.
            tensors: What the manifest says about the weights; the truth by default, where the file has any.
        """
        name = name or self.new_name()
        made = draft(version, seed)
        document = json.loads(made.manifest.to_bytes())
        content: dict[str, bytes | None] = {**{path: bytes(data) for path, data in made.files.items()}, **(files or {})}  # type: ignore[arg-type]
        for path, data in (files or {}).items():
            if data is not None:
                document["files"][path] = record(data)
        if tensors is not None:
            document["tensors"] = dict(tensors)
        elif files and WEIGHTS in files:
            document["tensors"] = tensors_in(files[WEIGHTS] or b"") or document["tensors"]
        manifest(document)
        content[MANIFEST] = json.dumps(document).encode()
        self.write(name, content, tag=f"v{version}")
        return name

    def commit_of(self, name: str, version: str = "1.0.0") -> str:
        """The commit of a release."""
        return self.place.hub.refs(name).tags[f"v{version}"]

    def exchange(self, name: str, version: str, files: Mapping[str, bytes]) -> None:
        """Serve other bytes under a commit that stands."""
        if isinstance(self.place, LoopbackPlace):
            for path, data in files.items():
                self.loopback.faults.replace(path, data)
            return
        folder = self.root / name / "commits" / self.commit_of(name, version)
        for path, data in files.items():
            (folder / path).write_bytes(data)

    # -- the victim ----------------------------------------------------------------------------------------------

    def pull(self, reference: str, **options: Any) -> Adapter:
        """Pull, from the registry of the scene unless another one is named."""
        return pull_adapter(reference, **{"hub": self.place.hub, **options})

    def push(self, folder: Path, name: str | None = None, **options: Any) -> object:
        """Push an adapter folder."""
        arguments = {"version": "1.0.0", "hub": self.place.hub, **options}
        return push_adapter(folder, name or self.new_name(), **arguments)

    def adapter(self, files: Mapping[str, bytes] | None = None) -> Path:
        """A folder with an adapter that could be pushed, with other files in place of its own."""
        folder = self.new_folder()
        content = {path: bytes(data) for path, data in draft("1.0.0").files.items() if path in (CONFIG, WEIGHTS)}  # type: ignore[arg-type]
        for path, data in {**content, **(files or {})}.items():
            (folder / path).write_bytes(data)
        return folder

    # -- what is left --------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, object]:
        """Everything in cache, lock file, temporary folder and registry."""
        found: dict[str, object] = {}
        for root in (self.cache, self.folder / "temporary", self.lock):
            found.update(_everything(root))
        if isinstance(self.place, FolderPlace):
            found.update(_everything(self.root))
        else:
            for name, repo in self.loopback._site.store.repos.items():
                found[name] = (dict(repo.branches), dict(repo.tags), sorted(repo.commits))
        return found

    def temporary(self) -> list[str]:
        """What looks like the half of something."""
        places = [self.cache, self.folder / "temporary", self.lock.parent]
        if isinstance(self.place, FolderPlace):
            places.append(self.root)
        return [str(path) for place in places for path in place.rglob("*") if path.name.startswith(_TEMPORARY)]


def _everything(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in (root, *sorted(root.rglob("*"))):
        if not os.path.lexists(path) or (path == root and path.is_dir()):
            continue
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
            continue
        status = path.stat()
        if path.parent.name == "checked":
            found[str(path)] = "note"
        elif path.name in _SKELETON:
            continue
        elif not path.is_dir():
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
        else:
            found[str(path)] = "folder"
    return found


# -- files of an attacker --------------------------------------------------------------------------------------------


def record(data: bytes) -> dict[str, object]:
    """What a manifest says about a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def config(**changes: Any) -> bytes:
    """An adapter configuration with other fields."""
    from releases import CONFIG as fields

    return json.dumps({**fields, **changes}).encode()


def values(**tensors: Any) -> bytes:
    """A weights file: A and B as usual unless given, and more tensors by name."""
    random = numpy.random.default_rng(0)
    usual = {
        A: random.standard_normal((2, 8), dtype=numpy.float32),
        B: random.standard_normal((8, 2), dtype=numpy.float32),
    }
    chosen = {**usual, **{{"A": A, "B": B}.get(name, name): tensor for name, tensor in tensors.items()}}
    return bytes(save({name: tensor for name, tensor in chosen.items() if tensor is not None}))


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A weights file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensors_in(data: bytes) -> dict[str, Any]:
    """What a header says about the tensors, as an attacker puts it into the manifest; nothing if it cannot be read."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {
            name: {"dtype": entry["dtype"], "shape": entry["shape"]}
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {}


def is_expected(error: BaseException, errors: tuple[type[BaseException], ...]) -> bool:
    """Whether an error is one of the attack's, and one of the registry's own that can be shown."""
    own = isinstance(error, (RegistryError, UserWarning))
    return own and isinstance(error, errors) and str(error).isprintable() and len(str(error)) < 5000
