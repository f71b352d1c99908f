"""Attacks 19 to 38: integrity, identity, races, broken machines, network and secrets, planted on either registry."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import logging
import os
import pickle
import shutil
import threading
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pushers
from attacking import CONFIG, MANIFEST, WEIGHTS, Attack, Attempt, Scene, harmless, refused
from hubs import FolderPlace, LoopbackPlace
from markdown_it import MarkdownIt
from pushers import context, finished
from releases import CREATED, draft, folder_of, release

from registry import HuggingFaceHub, collect_garbage, lock_adapters, pull_adapter, set_alias, unyank, verify, yank
from registry.errors import (
    HostileAnswer,
    HubError,
    HubUnavailable,
    IntegrityError,
    InvalidReference,
    LockMismatch,
    MachineError,
    NotAdapter,
    Offline,
    PlainTokenWarning,
    PublishError,
    RegistryError,
    ReleaseMoved,
    RepositoryNotFound,
    RepositoryReplaced,
    UnsafeFile,
    VersionExists,
    VersionNotFound,
)
from registry.publishing.card import model_card
from registry.testing import LoopbackHub


def _same(scene: Scene, reference: str, seed: int, version: str = "1.0.0", **options: Any) -> None:
    """A pull gives the bytes that were published."""
    found = folder_of(Path(scene.pull(reference, **options).path))
    assert {path: found[path] for path in (CONFIG, WEIGHTS)} == {
        path: draft(version, seed).files[path] for path in (CONFIG, WEIGHTS)
    }


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# -- integrity and identity ------------------------------------------------------------------------------------------


def _tampered(scene: Scene) -> Iterator[Attempt]:
    for file in (WEIGHTS, CONFIG, "README.md"):
        name = scene.publish()
        scene.place.tamper(name, scene.commit_of(name), file)
        yield refused(f"a bit of {file}", lambda name=name: scene.pull(name))
        if scene.kind == "loopback":
            scene.loopback.faults.clear()


def _exchanged(scene: Scene) -> Iterator[Attempt]:
    other = draft("1.0.0", 9)
    for label, file, content in (
        ("other weights of the same size", WEIGHTS, bytes(other.files[WEIGHTS])),  # type: ignore[arg-type]
        ("half of the weights", WEIGHTS, bytes(other.files[WEIGHTS])[:80]),  # type: ignore[arg-type]
        ("nothing", CONFIG, b""),
    ):
        name = scene.publish()
        scene.exchange(name, "1.0.0", {file: content})
        yield refused(label, lambda name=name: scene.pull(name))
        if scene.kind == "loopback":
            scene.loopback.faults.clear()


def _moved_tags(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    scene.publish(name, version="1.1.0", seed=2)
    scene.pull(f"{name}@1.1.0", lock=True)
    right = scene.commit_of(name, "1.1.0")
    scene.place.move_tag(name, "v1.1.0", scene.commit_of(name))
    yield refused("moved", lambda: scene.pull(f"{name}@1.1.0"))
    yield refused("moved, by a lock", lambda: scene.pull(name))
    cache = scene.cache
    scene.fresh_machine()
    yield refused("moved, by a lock on another machine", lambda: scene.pull(name))
    yield refused("to the commit of another version", lambda: scene.pull(f"{name}@1.1.0", lock=False))
    scene.cache = cache
    scene.patch.setenv("LORA_REGISTRY_CACHE", str(cache))
    scene.place.move_tag(name, "v1.1.0", None)
    yield refused("deleted", lambda: scene.pull(f"{name}@1.1.0"))
    made = scene.write(name, {path: bytes(data) for path, data in draft("1.1.0", 7).all_files().items()}, tag="v1.1.0")  # type: ignore[arg-type]
    assert made != right
    yield refused("made again", lambda: scene.pull(f"{name}@1.1.0"))
    other = scene.publish(seed=3)
    foreign = scene.commit_of(other)
    if scene.kind == "loopback":
        scene.loopback.repo(name).tags["v1.2.0"] = foreign
    else:
        scene.place.move_tag(name, "v1.2.0", foreign)
    yield refused("to a commit of another repository", lambda: scene.pull(f"{name}@1.2.0", lock=False))
    scene.place.move_tag(name, "v1.2.0", None)
    scene.place.move_tag(name, "v1.1.0", right)
    if scene.kind == "loopback":  # all of main as one commit, as the Hub's super-squash makes it
        repo = scene.loopback.repo(name)
        squashed = scene.loopback.commit(name, {}, message="squashed")
        repo.branches["main"] = squashed
    yield harmless("a branch written anew", lambda: _same(scene, f"{name}@1.1.0", 2, "1.1.0"))


def _other_tree(scene: Scene) -> Iterator[Attempt]:
    missing = scene.publish(
        manifest=lambda document: document["files"].update({"vocab.txt": {"size": 1, "sha256": "0" * 64}})
    )
    yield refused("a file of the manifest is missing", lambda: scene.pull(missing))
    other = scene.publish(files={"vocab.txt": b"a"}, manifest=lambda d: d["files"]["vocab.txt"].update(sha256="0" * 64))
    yield refused("another hash", lambda: scene.pull(other))
    tensors = scene.publish(manifest=lambda document: document["tensors"].popitem())
    yield refused("other tensors", lambda: scene.pull(tensors))
    version = scene.publish(manifest=lambda document: document.update(version="1.0.1"))
    yield refused("another version", lambda: scene.pull(version))
    extra = scene.publish()
    scene.place.plant(extra, scene.commit_of(extra), {"evil.py": b"x", "adapter_model.bin": b"x"})

    def pulled() -> None:
        adapter = scene.pull(extra)
        assert set(os.listdir(adapter.path)) == {*adapter.manifest.files, MANIFEST}

    yield harmless("files that are not in the manifest", pulled)
    forged = scene.publish()
    scene.pull(forged, lock=True)
    scene.fresh_machine()
    scene.exchange(forged, "1.0.0", {path: bytes(data) for path, data in draft("1.0.0", 7).all_files().items()})  # type: ignore[arg-type]
    yield refused("everything, with all hashes right, against a lock", lambda: scene.pull(forged))


def _rollback(scene: Scene) -> Iterator[Attempt]:
    """A first pull cannot know what was there; from the second on, the machine remembers."""
    name = scene.publish(seed=1)
    scene.publish(name, version="1.1.0", seed=2)
    scene.pull(name, lock=False)
    newest = scene.commit_of(name, "1.1.0")
    scene.place.move_tag(name, "v1.1.0", None)
    yield refused("the newest version is hidden", lambda: scene.pull(name, lock=False))
    yield refused("and asked for by number", lambda: scene.pull(f"{name}@1.1.0", lock=False))
    scene.place.move_tag(name, "v1.1.0", newest)
    yank(f"{name}@1.1.0", "broken", hub=scene.place.hub)
    scene.pull(name, lock=False)
    _move_branch(scene, name, "registry", scene.commit_of(name))
    yield refused("a withdrawal is taken back by rolling the state back", lambda: scene.pull(name, lock=False))
    _move_branch(scene, name, "registry", None)
    yield refused("or by deleting it", lambda: scene.pull(name, lock=False))


def _move_branch(scene: Scene, name: str, branch: str, commit: str | None) -> None:
    if isinstance(scene.place, LoopbackPlace):
        branches = scene.loopback.repo(name).branches
        branches.pop(branch, None)
        if commit:
            branches[branch] = commit
        return
    path = scene.root / name / "refs.json"
    refs = json.loads(path.read_text())
    refs["branches"].pop(branch, None)
    if commit:
        refs["branches"][branch] = commit
    path.write_text(json.dumps(refs))


def _registered_anew(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    scene.pull(name, lock=True)
    scene.place.delete(name)
    scene.publish(name, seed=5)
    scene.publish(name, version="1.1.0", seed=6)
    for reference in (name, f"{name}@1.0.0", f"{name}@1.1.0"):
        yield refused(f"{reference}, by a lock", lambda reference=reference: scene.pull(reference))
        yield refused(f"{reference}, by memory", lambda reference=reference: scene.pull(reference, lock=False))
    yield refused("locked anew", lambda: lock_adapters([name], hub=scene.place.hub))


def _confused(scene: Scene) -> Iterator[Attempt]:
    local = scene.folder / "work" / "org" / "shadow"
    local.mkdir(parents=True)
    for path, data in draft("1.0.0", 9).all_files().items():
        (local / path).write_bytes(bytes(data))  # type: ignore[arg-type]
    yield refused("a folder of the name of an adapter that is not there", lambda: scene.pull("org/shadow"))
    scene.publish("org/shadow", seed=1)
    yield harmless("a folder of the name of an adapter", lambda: _same(scene, "org/shadow", 1))
    scene.publish("org/adapter", seed=1)
    for name in ("org/adaptor", "0rg/adapter", "Org/adapter", "org/Adapter", "org/adapter_"):
        yield refused(f"a name that is nearly right: {name}", lambda name=name: scene.pull(name))
    yield refused("a letter of another alphabet", lambda: scene.pull("org/\u0430dapter"))
    yield refused("a folder as a registry", lambda: pull_adapter("org/shadow", hub="./registry"))


def _damaged(scene: Scene) -> Iterator[Attempt]:
    for file in (WEIGHTS, CONFIG, MANIFEST):
        name = scene.publish()
        content = _served(scene, name, file)
        for label, damage in (("a bit", _flipped(content)), ("half", content[: len(content) // 2])):
            scene.exchange(name, "1.0.0", {file: damage})
            yield refused(f"{label} of {file} in the registry", lambda name=name: scene.pull(name))
            if scene.kind == "loopback":
                scene.loopback.faults.clear()
        scene.exchange(name, "1.0.0", {file: content})
        if scene.kind == "loopback":
            scene.loopback.faults.clear()
        pulled = Path(scene.pull(name).path, file)
        for damage in (_flipped(content), content[: len(content) // 2]):
            _overwrite(pulled, damage)
            yield harmless(f"{file} in the cache", lambda name=name: _same(scene, name, 0))
            _overwrite(pulled, damage)
            yield refused(f"{file} in the cache, offline", lambda name=name: _offline(scene, name))
    hub_cache = scene.new_folder()
    scene.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    name = scene.publish(seed=3)
    snapshot = hub_cache / f"models--{name.replace('/', '--')}" / "snapshots" / scene.commit_of(name)
    snapshot.mkdir(parents=True)
    for path, data in draft("1.0.0", 9).all_files().items():
        (snapshot / path).write_bytes(bytes(data))  # type: ignore[arg-type]
    (snapshot.parent.parent / "trees").mkdir()
    (snapshot.parent.parent / "trees" / f"{scene.commit_of(name)}.json").write_text('{"files": [{"path": "../../x"}]}')
    yield harmless("the cache of huggingface_hub", lambda: _same(scene, name, 3))


def _served(scene: Scene, name: str, file: str) -> bytes:
    return scene.place.hub.read(name, scene.commit_of(name), file, 10_000_000)


def _overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _offline(scene: Scene, name: str) -> object:
    if scene.kind == "loopback":
        return scene.pull(name, offline=True)
    with scene.patch.context() as patch:
        patch.setattr(type(scene.place.hub), "local", False)
        return scene.pull(name, offline=True)


# -- concurrency and time --------------------------------------------------------------------------------------------


def _call(scene: Scene, version: str, seed: int) -> tuple[Any, ...]:
    token = scene.loopback.token if scene.kind == "loopback" else None
    return (scene.place.hub.location, token, version, seed, CREATED)


def _together(actions: list[Callable[[], object]]) -> list[object]:
    """What came of calls at the same moment: results, or the errors of the registry that they ended with."""
    barrier, results = threading.Barrier(len(actions)), list[object]([None] * len(actions))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = actions[index]()
        except RegistryError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def _racing_pushes(scene: Scene) -> Iterator[Attempt]:
    def race() -> None:
        start = context()
        barrier, results = start.Barrier(4), start.Queue()
        calls = [_call(scene, "1.0.0", seed) for seed in range(4)]
        processes = [start.Process(target=pushers.push_together, args=(barrier, results, call)) for call in calls]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=60) for _ in calls]
        assert [finished(process) for process in processes] == [0] * 4
        assert outcomes.count("VersionExists") == 3
        tags = scene.place.hub.refs("org/adapter").tags
        assert list(tags) == ["v1.0.0"]
        assert tags["v1.0.0"] in outcomes
        assert verify("org/adapter@1.0.0", hub=scene.place.hub).ok

    yield harmless("four processes and one version", race)
    name = scene.publish(seed=1)
    yield refused("too late", lambda: release(scene.place.hub, "1.0.0", 2, name=name))


def _other_races(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    hub = scene.place.hub

    def race() -> None:
        results = _together([
            lambda: release(hub, "2.0.0", 2, name=name),
            lambda: yank(f"{name}@1.0.0", "broken", hub=hub),
            lambda: set_alias(f"{name}@1.0.0", "champion", hub=hub),
            lambda: collect_garbage(hub, dry_run=False) if scene.kind == "folder" else None,
        ])  # fmt: skip
        assert [str(result) for result in results if isinstance(result, BaseException)] == []
        _same(scene, f"{name}@2.0.0", 2, "2.0.0")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _same(scene, f"{name}@champion", 1)
        assert any("broken" in str(warning.message) for warning in caught)

    yield harmless("push, withdrawal, alias and garbage collection", race)


def _killed(scene: Scene) -> Iterator[Attempt]:
    """The steps one by one are in test_registry_processes; here are the four moments that the list names."""
    start = context()

    def after_death(kill: Callable[[], int | None]) -> Callable[[], None]:
        def check() -> None:
            assert kill() == -9
            tags = scene.place.hub.refs("org/adapter").tags if _exists(scene, "org/adapter") else {}
            assert set(tags) <= {"v1.0.0"}
            release(scene.place.hub, "1.0.0", 1)
            _same(scene, "org/adapter", 1)
            assert verify("org/adapter", hub=scene.place.hub).ok
            scene.place.delete("org/adapter")
            scene.fresh_machine()

        return check

    def in_folder(step: int) -> Callable[[], int | None]:
        def kill() -> int | None:
            arguments = (str(scene.root), step, _call(scene, "1.0.0", 1), {})
            process = start.Process(target=pushers.push_and_die, args=arguments)
            process.start()
            return finished(process)

        return kill

    def at_hub(route: str, *, after: bool) -> Callable[[], int | None]:
        def kill() -> int | None:
            pid = start.Value("i", 0)

            def die(request: object) -> None:
                while not pid.value:
                    time.sleep(0.001)
                os.kill(pid.value, 9)

            moment = scene.loopback.faults.call_after if after else scene.loopback.faults.call_before
            moment(route, die, times=1)
            process = start.Process(target=pushers.push_alone, args=(_call(scene, "1.0.0", 1), {}))
            process.start()
            pid.value = process.pid or 0
            code = finished(process)
            scene.loopback.faults.clear()
            return code

        return kill

    if scene.kind == "folder":
        for step in (3, 9, 15, 21):
            yield harmless(f"before change {step}", after_death(in_folder(step)))
    else:
        for route, after in (("commit", False), ("commit", True), ("tag", False), ("tag", True)):
            yield harmless(f"{'after' if after else 'before'} the {route}", after_death(at_hub(route, after=after)))


def _exists(scene: Scene, name: str) -> bool:
    try:
        return bool(scene.place.hub.refs(name))
    except RepositoryNotFound:
        return False


class _Lossy:
    """A hub that does what it is asked for and then says that it did not answer."""

    def __init__(self, hub: Any, method: str) -> None:
        self._hub, self._method, self._left = hub, method, 1

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._hub, name)
        if name != self._method or not self._left:
            return found

        def lose(*args: Any, **kwargs: Any) -> Any:
            found(*args, **kwargs)
            self._left = 0
            raise HubUnavailable("the answer was lost")

        return lose


def _lost_answers(scene: Scene) -> Iterator[Attempt]:
    for route, method in (("commit", "commit"), ("tag", "create_tag")):
        name = scene.new_name()
        if scene.kind == "loopback":
            for status in (None, 503):
                lost = scene.new_name()

                def push(name: str = lost, route: str = route, status: int | None = status) -> None:
                    scene.loopback.faults.lose_response(route, status=status)
                    assert release(scene.place.hub, "1.0.0", 1, name=name).created
                    _same(scene, name, 1)

                yield harmless(f"{route}, status {status}", push)
        hub = _Lossy(scene.place.hub, method)
        yield refused_and_done(scene, f"{route}, for good", name, hub)


def refused_and_done(scene: Scene, label: str, name: str, hub: Any) -> Attempt:
    """A push whose answer is lost says so, and the same push again is success."""

    def push() -> None:
        with contextlib.suppress(HubUnavailable):
            release(hub, "1.0.0", 1, name=name)
        done = release(hub, "1.0.0", 1, name=name)
        assert scene.place.hub.refs(name).tags == {"v1.0.0": done.commit}
        _same(scene, name, 1)

    return harmless(label, push)


def _exchanged_meanwhile(scene: Scene) -> Iterator[Attempt]:
    folder = scene.adapter()
    from registry.publishing import source

    copy = source.copy_adapter

    def exchange(*args: Any, **kwargs: Any) -> Any:
        copied = copy(*args, **kwargs)
        (folder / WEIGHTS).write_bytes(b"exchanged")
        (folder / CONFIG).write_bytes(b"{}")
        return copied

    def push() -> None:
        name = scene.new_name()
        with scene.patch.context() as patch:
            patch.setattr(source, "copy_adapter", exchange)
            scene.push(folder, name)
        adapter = scene.pull(name)
        assert Path(adapter.path, WEIGHTS).read_bytes() == draft("1.0.0").files[WEIGHTS]

    yield harmless("the folder, during a push", push)
    name = scene.publish()
    pulled = Path(scene.pull(name).path)
    _overwrite(pulled / WEIGHTS, b"exchanged")
    yield harmless("the cache, between two pulls", lambda: _same(scene, name, 0))
    grown = scene.publish(seed=5)
    hub = _Growing(scene.place.hub)
    yield refused("a file, while it is downloaded", lambda: scene.pull(grown, hub=hub))


class _Growing:
    """A hub whose files are other ones at each reading."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def download(self, name: str, commit: str, path: str, sink: Any, limit: int) -> None:
        self._hub.download(name, commit, path, sink, limit)
        sink.seek(0)
        sink.write(os.urandom(8))


def _broken_machines(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)

    def fail(code: int) -> Callable[..., Any]:
        def raising(*args: Any, **kwargs: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return raising

    def with_patch(target: str, value: Any, action: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with scene.patch.context() as patch:
                patch.setattr(target, value)
                return action()

        return run

    yield refused("a full disk", with_patch("os.chmod", fail(errno.ENOSPC), lambda: scene.pull(name)))
    yield refused("a rename across devices", with_patch("os.rename", fail(errno.EXDEV), lambda: scene.pull(name)))
    yield refused("a read-only cache", with_patch("os.mkdir", fail(errno.EROFS), lambda: scene.pull(name)))
    scene.publish(name, version="1.1.0", seed=2)
    scene.pull(f"{name}@1.0.0", lock=False)
    full = with_patch("os.chmod", fail(errno.ENOSPC), lambda: scene.pull(name, lock=False))
    yield refused("a full disk where an older version is in the cache", full)
    push = lambda: release(scene.place.hub, "3.0.0", 4, name=name)  # noqa: E731
    yield harmless("no hard links", with_patch("os.link", fail(errno.EPERM), push))
    place = scene.place
    if isinstance(place, FolderPlace):
        lock = place.root / name / "lock"
        dead = {"host": "x", "pid": 2**22 + 1, "started": "1", "nonce": "n"}
        for label, content in {
            "of a dead process": json.dumps(dead).encode(),
            "of a pid that is none": b'{"host": "x", "pid": 2147483648}',
            "that is deep": b"[" * 100_000, "that is empty": b"",
        }.items():  # fmt: skip
            lock.write_bytes(content)
            os.utime(lock, (1, 1))
            number = len(label)
            again = partial(release, place.hub, f"4.{number}.0", number, name=name)
            yield harmless(f"a lock {label}", again)
        yield harmless(
            "a clock that goes backwards",
            with_patch("time.time", lambda: 1.0, lambda: release(place.hub, "5.0.0", 5, name=name)),
        )
    else:
        yield harmless(
            "a clock that goes backwards",
            with_patch("time.time", lambda: 1.0, lambda: _same(scene, f"{name}@1.1.0", 2, "1.1.0", lock=False)),
        )


# -- network and secrets ---------------------------------------------------------------------------------------------


def _redirects(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    if isinstance(scene.place, FolderPlace):
        secret = scene.new_folder() / "secret"
        secret.write_bytes(b'{"format": 1}')
        refs = scene.root / name / "refs.json"
        right = refs.read_text()
        for commit in ("../../../secret", "/etc", "..", "0" * 40):
            refs.write_text(json.dumps({"format": 1, "branches": {"main": commit}, "tags": {"v1.0.0": commit}}))
            yield refused(f"a commit that leads to {commit}", lambda: scene.pull(name))
        refs.write_text(right)
        (scene.root / name / "commits" / scene.commit_of(name) / WEIGHTS).unlink()
        (scene.root / name / "commits" / scene.commit_of(name) / WEIGHTS).symlink_to(secret)
        yield refused("a file that leads elsewhere", lambda: scene.pull(name))
        return
    for location in (
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "ftp://127.0.0.1/x",
        "local:///x",
        "//[::1",
        "",
    ):
        scene.loopback.faults.redirect("resolve", location)
        yield refused(f"to {location!r}", lambda: scene.pull(name))
        scene.loopback.faults.clear()
    with LoopbackHub() as other:
        scene.loopback.faults.redirect("resolve", f"{other.endpoint}/org/a/resolve/main/x")
        yield refused("to another hub", lambda: scene.pull(name))
        assert other.requests
        assert not any(served.authorized for served in other.requests)
    scene.loopback.faults.clear()
    scene.patch.setattr("registry.hubs.http.redirects.socket.getaddrinfo", _as_public)
    far = HuggingFaceHub(scene.loopback.endpoint, scene.loopback.token, timeout=1)
    scene.loopback.faults.redirect("resolve", "http://localhost:1/x")
    yield refused("of a public hub to this machine", lambda: scene.pull(name, hub=far))
    scene.loopback.faults.clear()
    assert scene.loopback.leaks() == []


def _as_public(host: str, *args: Any, **kwargs: Any) -> list[Any]:
    return [(2, 1, 6, "", ("127.0.0.1" if host == "localhost" else "93.184.215.14", 0))]


def _bad_answers(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    if isinstance(scene.place, FolderPlace):
        refs = scene.root / name / "refs.json"
        for label, content in {
            "HTML": b"<html>", "empty": b"", "deep": b"[" * 1_000_000, "a list": b"[]",
            "numbers": b'{"branches": 1, "tags": 2}',
            "no main": b'{"branches": {}, "tags": {}}',
        }.items():  # fmt: skip
            refs.write_bytes(content)
            yield refused(label, lambda: _within(5, lambda: scene.pull(name)))
        refs.unlink()
        os.mkfifo(refs)
        yield refused("a pipe without a writer", lambda: _within(5, lambda: scene.pull(name)))
        return
    hub = HuggingFaceHub(scene.loopback.endpoint, scene.loopback.token, timeout=0.4)
    faults = scene.loopback.faults
    bomb = gzip.compress(b" " * 100_000_000)
    pull = lambda: _within(8, lambda: scene.pull(name, hub=hub))  # noqa: E731
    for label, plant in {
        "HTML with status 200": lambda: faults.answer("refs", b"<html>", times=None),
        "empty": lambda: faults.answer("refs", b"", times=None),
        "deep": lambda: faults.answer("refs", b"[" * 100_000, times=None),
        "a gzip bomb": lambda: faults.answer("refs", bomb, times=None, Content_Encoding="gzip"),
        "a byte at a time": lambda: faults.drip("refs", 0.05),
        "429 for a thousand years": lambda: faults.status("refs", 429, times=None, headers={"Retry-After": "9" * 9}),
        "503 for ever": lambda: faults.status("*", 503, times=None),
        "nobody answers": lambda: faults.refuse_connection("*", times=None),
        "slow": lambda: faults.slow("refs", 3),
    }.items():  # fmt: skip
        plant()
        yield refused(label, pull)
        faults.clear()
    page = b'[{"type": "file", "path": "x", "size": 1, "oid": "0"}]'
    link = f'<{scene.loopback.endpoint}/api/models/{name}/tree/main?recursive=true>; rel="next"'
    faults.answer("tree", page, times=None, Link=link)
    yield refused("pages without end", lambda: _within(8, lambda: hub.files(name, scene.commit_of(name))))
    faults.clear()
    faults.answer("preupload", b" " * 2_000_000, times=None)
    yield refused("garbage for a push", lambda: _within(8, lambda: release(hub, "9.0.0", 9, name=name)))
    faults.clear()


def _within(seconds: float, action: Callable[[], object]) -> object:
    start = time.monotonic()
    try:
        return action()
    finally:
        assert time.monotonic() - start < seconds


def _tokens(scene: Scene) -> Iterator[Attempt]:
    token = scene.loopback.token if scene.kind == "loopback" else "hf_secret_secret_secret"
    name = scene.publish(seed=1)

    def search() -> None:
        texts: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        root = logging.getLogger().level
        logging.getLogger().setLevel(logging.DEBUG)
        try:
            texts += _told(scene, name, token)
        finally:
            logging.getLogger().removeHandler(handler)
            logging.getLogger().setLevel(root)
        texts += [path.read_bytes().decode("latin-1") for path in scene.folder.rglob("*") if path.is_file()]
        assert len(texts) > 20
        found = [text[max(0, text.find(token) - 300) :][:400] for text in texts if token in text]
        assert found == []
        assert not _leaks(scene)

    yield harmless("logs, errors, files", search)


def _leaks(scene: Scene) -> list[Any]:
    return list(scene.loopback.leaks()) if scene.kind == "loopback" else []


def _told(scene: Scene, name: str, token: str) -> list[str]:
    """Everything that calls with a token say, print and leave behind, also while a hub echoes it."""
    hub = scene.place.hub
    calls: list[Callable[[], object]] = [
        lambda: scene.pull(name, token=token, lock=True),
        lambda: scene.pull("org/nothing", token=token),
        lambda: scene.pull(f"{name}@9", token=token, lock=False),
        lambda: release(hub, "1.0.0", 2, name=name),
        lambda: yank(f"{name}@1.0.0", "x", hub=hub, token=token),
        lambda: unyank(f"{name}@1.0.0", hub=hub, token=token),
        lambda: verify(name, hub=hub, token=token),
    ]
    texts = [repr(hub), repr(vars(hub))]
    for echo in (False, True):
        if echo and scene.kind == "loopback":
            scene.loopback.faults.status(
                "*", 403, times=None, headers={"X-Error-Message": f"bad {token}", "X-Echo": token}
            )
        for call in calls:
            try:
                texts.append(repr(call()))
            except Exception as error:
                shown = traceback.TracebackException.from_exception(error, capture_locals=True)
                texts += [str(error), repr(vars(error)), repr(pickle.dumps(error)), *shown.format()]
    if scene.kind == "loopback":
        scene.loopback.faults.clear()
    # The locals of this test's own frames hold it.
    own = ("attacks_on_the_registry.py", "attacking.py", "test_registry_attacks.py")
    return [text for text in texts if not any(f'{name}"' in text for name in own)]


def _plain_token(scene: Scene) -> Iterator[Attempt]:
    if scene.kind == "folder":
        # A folder asks nobody: a token that is given along goes nowhere.
        name = scene.publish(seed=1)
        yield harmless("a token for a folder", lambda: _same(scene, name, 1, token="hf_secret"))
    for address in ("http://hub.example", "http://10.0.0.1:8080", "http://127.0.0.1.nip.example"):
        yield refused(address, lambda address=address: HuggingFaceHub(address, "hf_secret"))
    yield refused("a password in an address", lambda: pull_adapter("org/a", hub="https://user:pw@hub.example"))


_EVIL = (
    "\x1b[31mred\x1b[0m \u202etxt \u200b\r\n---\nlicense: evil\n# <img src=x onerror=alert(1)> [a](javascript:x) | `x`"
)


def _foreign_text(scene: Scene) -> Iterator[Attempt]:
    for name in ("org/\x1b[31m", "org/\u202ea", "org/a\r\nb", "org/<b>", "org/[a](x)"):
        yield refused(f"as a name: {name!r}", lambda name=name: scene.pull(name))
    name = scene.publish(seed=1)
    yield refused("as an alias", lambda: set_alias(f"{name}@1.0.0", "a\x1b[31m", hub=scene.place.hub))
    yield refused("as a reason", lambda: yank(f"{name}@1.0.0", _EVIL, hub=scene.place.hub))
    for field, value in (("base", {"id": "org/base\nlicense: evil"}), ("version", "1.0.0\n"), ("created", _EVIL)):
        planted = scene.publish(manifest=lambda document, field=field, value=value: document.update({field: value}))
        yield refused(f"in the manifest's {field}", lambda name=planted: scene.pull(name))
    planted = scene.publish(files={CONFIG: json.dumps({"peft_type": _EVIL, "r": 1}).encode()})
    yield refused("in a configuration", lambda: scene.pull(planted))
    if scene.kind == "loopback":
        scene.loopback.faults.status("refs", 403, times=None, headers={"X-Error-Message": "\x1b[31mred \x9b1m \x7f"})
        yield refused("in an answer", lambda: scene.pull(name))
        scene.loopback.faults.clear()

    def card() -> None:
        text = model_card(
            name="org/a", version="1.0.0", base="org/base", base_commit=None, parameters=[], picture=False,
            task_type=_EVIL,
            training={_EVIL: _EVIL, "quantization": _EVIL}, metrics={_EVIL: 1.0},
        )  # fmt: skip
        assert not any(unicodedata.category(char) in ("Cc", "Cf") for char in text.replace("\n", ""))
        head, _, body = text.removeprefix("---\n").partition("\n---\n")
        assert "evil" not in head
        page = MarkdownIt("commonmark").render(body)
        assert "&lt;img" in page
        assert not any(tag in page for tag in ("<img", "<a ", "license: evil</h"))

    yield harmless("in a card", card)


def _xet(scene: Scene) -> Iterator[Attempt]:
    scene.patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    victim = scene.folder / "victim"

    def push_and_pull() -> None:
        if scene.kind == "loopback":
            scene.loopback.faults.xet_cas_url = f"local://{victim}"
        name = scene.new_name()
        release(scene.place.hub, "1.0.0", 1, name=name)
        _same(scene, name, 1)
        assert not victim.exists()

    yield harmless("a storage that is a folder of this machine", push_and_pull)
    shutil.rmtree(victim, ignore_errors=True)


ATTACKS: tuple[Attack, ...] = (
    Attack(19, "tampered bytes of the same size", (IntegrityError,), _tampered),
    Attack(20, "exchanged bodies under the same tag", (IntegrityError, HostileAnswer), _exchanged),
    Attack(21, "moved tags and rewritten branches", (ReleaseMoved, IntegrityError, NotAdapter), _moved_tags),
    Attack(22, "a tree that is not the manifest's", (IntegrityError,), _other_tree),
    Attack(23, "rollback, from the second pull on", (IntegrityError,), _rollback),
    Attack(24, "a namespace registered anew", (RepositoryReplaced, LockMismatch, ReleaseMoved), _registered_anew),
    Attack(25, "similar names and local shadows", (RepositoryNotFound, InvalidReference), _confused),
    Attack(26, "bit flips and truncation", (IntegrityError, HubError, UnsafeFile, ValueError, Offline), _damaged),
    Attack(27, "racing pushes", (VersionExists,), _racing_pushes),
    Attack(28, "a push against everything else", (), _other_races),
    Attack(29, "killed in the middle", (), _killed),
    Attack(30, "lost answers", (), _lost_answers),
    Attack(31, "files exchanged between check and use", (IntegrityError,), _exchanged_meanwhile),
    Attack(32, "broken machines", (MachineError,), _broken_machines),
    Attack(33, "redirects", (HubError, IntegrityError, NotAdapter), _redirects),
    Attack(34, "answers that make no sense or no end", (HubError, VersionNotFound, PublishError), _bad_answers),
    Attack(35, "tokens where they do not belong", (), _tokens),
    Attack(36, "a token over plain http", (PlainTokenWarning, InvalidReference), _plain_token),
    Attack(37, "control characters and markup", (RegistryError,), _foreign_text),
    Attack(38, "a storage address chosen by the hub", (), _xet),
)
