"""The three kinds of hub that the registry's tests run on, and what tests do behind their backs."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from registry.hubs.folder import FolderHub
from registry.hubs.huggingface import HuggingFaceHub
from registry.hubs.objects import ObjectHub
from registry.hubs.protocol import Hub
from registry.testing import LoopbackHub

KINDS = ("folder", "loopback")
#: With a bucket, which needs an S3 server; without one, its tests are skipped.
EVERY_KIND = (*KINDS, "bucket")


class Place:
    """One hub of either kind."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def move_tag(self, name: str, tag: str, commit: str | None) -> None:
        """Let a tag stand elsewhere, or remove it, as the owner of a repository can."""
        raise NotImplementedError

    def tamper(self, name: str, commit: str, path: str) -> None:
        """Flip a bit in what the hub serves."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Delete a repository."""
        raise NotImplementedError

    def plant(self, name: str, commit: str, files: Mapping[str, bytes]) -> None:
        """Let a commit list more files."""
        raise NotImplementedError


class FolderPlace(Place):
    """A folder registry."""

    def __init__(self, root: Path) -> None:
        super().__init__(FolderHub(root))
        self.root = root

    def move_tag(self, name: str, tag: str, commit: str | None) -> None:
        path = self.root / name / "refs.json"
        refs = json.loads(path.read_text())
        refs["tags"].pop(tag, None)
        if commit is not None:
            refs["tags"][tag] = commit
        path.write_text(json.dumps(refs))

    def tamper(self, name: str, commit: str, path: str) -> None:
        file = self.root / name / "commits" / commit / path
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name)

    def plant(self, name: str, commit: str, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            file = self.root / name / "commits" / commit / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


class LoopbackPlace(Place):
    """A Hub on loopback."""

    def __init__(self, loopback: LoopbackHub, timeout: float = 5) -> None:
        super().__init__(HuggingFaceHub(loopback.endpoint, loopback.token, timeout))
        self.loopback = loopback

    def move_tag(self, name: str, tag: str, commit: str | None) -> None:
        if commit is None:
            del self.loopback.repo(name).tags[tag]
        else:
            self.loopback.move_tag(name, tag, commit)

    def tamper(self, name: str, commit: str, path: str) -> None:
        self.loopback.faults.tamper(path)

    def delete(self, name: str) -> None:
        self.loopback.delete_repo(name)

    def plant(self, name: str, commit: str, files: Mapping[str, bytes]) -> None:
        self.loopback.faults.hostile_listing(files)


class BucketPlace(Place):
    """A bucket of moto's S3 server on loopback."""

    def __init__(self, address: str) -> None:
        super().__init__(ObjectHub(address))

    @property
    def store(self) -> Any:
        """The store behind the hub, to write to behind its back."""
        return self.hub._store  # type: ignore[attr-defined]

    def move_tag(self, name: str, tag: str, commit: str | None) -> None:
        content, mark = self.store.read(f"{name}/refs.json", 10**7)
        refs = json.loads(content)
        refs["tags"].pop(tag, None)
        if commit is not None:
            refs["tags"][tag] = commit
        assert self.store.swap(f"{name}/refs.json", json.dumps(refs).encode(), mark)

    def tamper(self, name: str, commit: str, path: str) -> None:
        key = f"{name}/files/{self.hub.hashes(name, commit)[path]}"
        content = bytearray(self.store.find(key, 10**9))
        content[len(content) // 2] ^= 1
        self.store.put(key, io.BytesIO(content))

    def delete(self, name: str) -> None:
        for path, _, _ in list(self.store.list(name)):
            self.store.delete(path)

    def plant(self, name: str, commit: str, files: Mapping[str, bytes]) -> None:
        key = f"{name}/commits/{commit}.json"
        listing = json.loads(self.store.find(key, 10**7))
        for path, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            self.store.put(f"{name}/files/{digest}", io.BytesIO(content))
            listing[path] = [len(content), digest]
        self.store.put(key, io.BytesIO(json.dumps(listing).encode()))


def make_place(request: pytest.FixtureRequest, tmp_path: Path, **options: Any) -> Place:
    """Make a hub of the kind that is asked for.

    Args:
        request: Its parameter is the kind.
        tmp_path: Where a folder is made.
        **options: For `LoopbackPlace`.
    """
    if request.param == "folder":
        return FolderPlace(tmp_path / "registry")
    if request.param == "bucket":
        return BucketPlace(request.getfixturevalue("bucket"))
    assert request.param == "loopback"
    return LoopbackPlace(request.getfixturevalue("loopback_hub"), **options)
