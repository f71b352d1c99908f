"""A push destroys nothing: what others put into a repository stays, byte for byte, on both kinds of hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from packaging.version import Version
from releases import CONFIG, NAME, contents, draft, release

from registry import (
    aliases,
    collect_garbage,
    mirror,
    pull_adapter,
    push_adapter,
    set_alias,
    unyank,
    verify,
    versions,
    yank,
)
from registry.errors import RepositoryConflict, VersionExists
from registry.formats.readme import BEGIN
from registry.hubs.protocol import MAIN
from registry.publishing import publish as publishing
from registry.publishing.publish import publish

#: Ten files that no release put there.
FOREIGN = {
    "LICENSE": b"Apache License\n",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Written by hand\n\nMind the *gap*.\n",
    "model-q4.gguf": b"GGUF" + bytes(range(256)),
    "notes/results.csv": b"step,loss\n1,2.5\n",
    "other/adapter_config.json": json.dumps(CONFIG).encode(),
    "other/adapter_model.safetensors": contents(9)["adapter_model.safetensors"],
    "weights.safetensors": contents(8)["adapter_model.safetensors"],
    "handler.py": b"print('hello')\n",
    "picture.png": b"\x89PNG\r\n",
    "training_args.bin": b"\x80\x02pickle",
}
BASE = {"config.json": b'{"model_type": "llama"}', "model.safetensors": contents(7)["adapter_model.safetensors"]}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "adapter_manifest.json"}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", 0.2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder whose base is on a hub."""
    return adapter(tmp_path / "adapter")


def adapter(path: Path, seed: int = 0) -> Path:
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes(contents(seed)[name])
    return path


def put(place: Place, files: Mapping[str, bytes], branch: str = MAIN, delete: tuple[str, ...] = ()) -> str:
    """Commit files as somebody does who has never heard of releases."""
    place.hub.create(NAME)
    head = place.hub.refs(NAME).branches[branch]
    return place.hub.commit(NAME, branch, dict(files), parent=head, message="by hand", delete=delete)


def on(place: Place, branch: str = MAIN) -> dict[str, bytes]:
    """All files of a branch."""
    head = place.hub.refs(NAME).branches[branch]
    names = [path for path in place.hub.files(NAME, head) if path != ".gitattributes"]
    return {path: place.hub.read(NAME, head, path, 10**8) for path in names}


def kept(place: Place, files: Mapping[str, bytes] = FOREIGN) -> bool:
    there = on(place)
    return {path: there.get(path) for path in files} == dict(files)


# -- what others put there -----------------------------------------------------------------------------------------


def test_ten_files_of_others_survive_whatever_is_done_with_releases(place: Place, folder: Path, tmp_path: Path) -> None:
    put(place, FOREIGN)
    first = push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    assert kept(place)
    push_adapter(adapter(tmp_path / "next", 1), NAME, version="2.0.0", hub=place.hub)
    assert kept(place)
    push_adapter(adapter(tmp_path / "fix", 2), NAME, version="1.0.1", hub=place.hub)
    push_adapter(adapter(tmp_path / "early", 3), NAME, version="3.0.0rc1", hub=place.hub)
    yank(f"{NAME}@1.0.0", "wrong data", hub=place.hub)
    unyank(f"{NAME}@1.0.0", hub=place.hub)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    set_alias(f"{NAME}@2.0.0", "champion", hub=place.hub)
    collect_garbage(place.hub, dry_run=False)
    assert kept(place)
    assert set(on(place)) == {*FOREIGN, *ADAPTER, "ADAPTER_CARD.md"}
    assert set(on(place, "registry")) == {"registry.json"}
    # None of them is part of a release.
    assert set(first.manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "ADAPTER_CARD.md"}
    for reference in (NAME, f"{NAME}@1.0.0", f"{NAME}@1.0.1", f"{NAME}@3.0.0rc1", f"{NAME}@champion"):
        pulled = pull_adapter(reference, hub=place.hub)
        assert {file.name for file in Path(pulled.path).iterdir()} == {*ADAPTER, "ADAPTER_CARD.md"}
        looked = verify(reference, hub=place.hub)
        assert (looked.ok, looked.others) == (True, tuple(sorted(FOREIGN)))


def test_files_that_come_between_two_versions_survive_the_second(place: Place, folder: Path, tmp_path: Path) -> None:
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    added = {name: content for name, content in FOREIGN.items() if name != "README.md"}
    put(place, added)
    done = push_adapter(adapter(tmp_path / "next", 1), NAME, version="patch", hub=place.hub)
    assert done.version == "1.0.1"
    assert kept(place, added)
    assert done.changes is not None
    assert done.changes.left == tuple(sorted(added))


def test_a_file_of_a_release_that_somebody_changed_is_not_deleted(place: Place) -> None:
    publish(place.hub, NAME, Version("1.0"), lambda *_: draft("1.0", vocab_txt=b"a b"))
    put(place, {"vocab.txt": b"c d"})
    release(place.hub, "1.1.0")
    assert on(place)["vocab.txt"] == b"c d"


def test_weights_that_somebody_put_over_a_release_are_not_replaced_in_silence(place: Place, folder: Path) -> None:
    release(place.hub, "1.0.0", seed=4)
    newer = contents(5)["adapter_model.safetensors"]
    put(place, {"adapter_model.safetensors": newer})
    with pytest.raises(RepositoryConflict, match=r"adapter_model\.safetensors.*force=True"):
        push_adapter(folder, NAME, version="1.1.0", hub=place.hub)
    assert on(place)["adapter_model.safetensors"] == newer
    done = push_adapter(folder, NAME, version="1.1.0", hub=place.hub, force=True)
    assert done.changes is not None
    assert done.changes.overwritten == ("adapter_model.safetensors",)


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapter_config.json", "adapter_manifest.json"])
def test_an_adapter_without_versions_is_not_replaced_in_silence(place: Place, folder: Path, path: str) -> None:
    put(place, {path: b"somebody's"})
    with pytest.raises(RepositoryConflict, match=path.replace(".", r"\.")):
        push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    assert on(place) == {path: b"somebody's"}
    assert place.hub.refs(NAME).tags == {}
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub, force=True)
    assert pull_adapter(NAME, hub=place.hub).version == "1.0.0"


def test_the_same_bytes_under_the_same_name_are_no_conflict(place: Place, folder: Path) -> None:
    put(place, {"adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes()})
    assert push_adapter(folder, NAME, version="1.0.0", hub=place.hub).created


def test_a_branch_called_registry_keeps_its_files(place: Place, folder: Path) -> None:
    put(place, {"a.txt": b"a"})
    place.hub.create_branch(NAME, "registry", place.hub.refs(NAME).branches[MAIN])
    put(place, {"b.txt": b"b"}, "registry")
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    yank(f"{NAME}@1.0.0", "wrong", hub=place.hub)
    there = on(place, "registry")
    assert (there.pop("b.txt"), set(there)) == (b"b", {"a.txt", "registry.json"})
    assert versions(NAME, hub=place.hub)[0].yanked == "wrong"


def test_a_file_called_registry_json_is_not_the_state(place: Place, folder: Path) -> None:
    put(place, {"registry.json": b"[]"})
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    assert list(aliases(NAME, hub=place.hub)) == ["champion"]
    assert on(place)["registry.json"] == b"[]"


def test_a_copy_destroys_nothing_either(place: Place, folder: Path, tmp_path: Path) -> None:
    source = FolderPlace(tmp_path / "source")
    push_adapter(folder, NAME, version="1.0.0", hub=source.hub)
    others = {name: content for name, content in FOREIGN.items() if name != "README.md"}
    put(place, others)
    mirror(NAME, place.hub, hub=source.hub)
    assert kept(place, others)
    assert verify(NAME, hub=place.hub).ok


def test_a_copy_does_not_replace_a_readme(place: Place, folder: Path, tmp_path: Path) -> None:
    source = FolderPlace(tmp_path / "source")
    push_adapter(folder, NAME, version="1.0.0", hub=source.hub)
    put(place, FOREIGN)
    with pytest.raises(RepositoryConflict, match=r"README\.md"):
        mirror(NAME, place.hub, hub=source.hub)
    assert kept(place)


# -- a repository of a base model ----------------------------------------------------------------------------------

INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    "files",
    [
        BASE,
        {"config.json": b'{"architectures": ["BertModel"]}', "pytorch_model.bin": b"x"},
        {"model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": b"x"},
        {"config.json": b'{"model_type": "llama"}', "base-q4.gguf": b"GGUF"},
        {"config.json": b'{"model_type": "llama"}', "custom-v2.safetensors": b"x"},
        {"model_index.json": b'{"_class_name": "X"}', "unet/config.json": b'{"_class_name": "Y"}', "unet/w.bin": b"x"},
        {**BASE, "adapter_config.json": b"{}"},
    ],
    ids=["safetensors", "bin", "index", "gguf", "own-name", "folders", "with-adapter"],
)
def test_a_base_models_repository_is_refused_by_name(place: Place, folder: Path, files: dict[str, bytes]) -> None:
    put(place, files)
    with pytest.raises(RepositoryConflict, match=r"org/adapter holds a base model: .*force=True"):
        push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    with pytest.raises(RepositoryConflict, match="holds a base model"):
        push_adapter(folder, NAME, version="1.0.0rc1", hub=place.hub)
    assert on(place) == files
    assert sorted(place.hub.refs(NAME).branches) == [MAIN]


def test_who_insists_publishes_beside_the_base_and_keeps_it(place: Place, folder: Path, tmp_path: Path) -> None:
    put(place, BASE)
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub, force=True)
    # From then on it is known to be an adapter's, too.
    push_adapter(adapter(tmp_path / "next", 1), NAME, version="patch", hub=place.hub)
    assert kept(place, BASE)
    assert [str(each) for each in versions(NAME, hub=place.hub)] == [f"{NAME}@1.0.0", f"{NAME}@1.0.1"]


@pytest.mark.parametrize(
    "files",
    [
        {"model-q4.gguf": b"GGUF"},
        {"config.json": b'{"lr": 1}', "training_args.bin": b"x"},
        {"config.json": b'{"model_type": "llama"}', "adapter_model.bin": b"x", "optimizer.pt": b"y"},
        {"checkpoint-5/adapter_config.json": b"{}", "checkpoint-5/optimizer.bin": b"x", "config.json": b"not json"},
    ],
    ids=["gguf", "config-of-a-run", "axolotl", "checkpoint"],
)
def test_what_people_keep_beside_adapters_is_not_a_base(place: Place, folder: Path, files: dict[str, bytes]) -> None:
    put(place, files)
    assert push_adapter(folder, NAME, version="1.0.0", hub=place.hub).created
    assert kept(place, files)


# -- the README ----------------------------------------------------------------------------------------------------


def test_a_readme_that_somebody_wrote_is_left_and_the_card_stands_beside_it(place: Place, folder: Path) -> None:
    put(place, {"README.md": FOREIGN["README.md"]})
    done = push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    there = on(place)
    assert there["README.md"] == FOREIGN["README.md"]
    assert b"# org/adapter 1.0.0" in there["ADAPTER_CARD.md"]
    assert done.changes is not None
    assert done.changes.left == ("README.md",)


def test_what_people_write_around_the_card_is_kept(place: Place, folder: Path, tmp_path: Path) -> None:
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub, metrics={"accuracy": 0.5})
    text = on(place)["README.md"].decode()
    edited = text.replace("library_name", "license: mit\nlibrary_name").replace(BEGIN, f"Mind the gap.\n\n{BEGIN}")
    put(place, {"README.md": f"{edited}\n## Thanks\n".encode()})
    for number in (1, 2):
        push_adapter(adapter(tmp_path / str(number), number), NAME, version="patch", hub=place.hub)
    now = on(place)["README.md"].decode()
    assert "license: mit" in now
    assert "# org/adapter 1.0.2" in now
    assert "1.0.0" not in now
    assert now.index("Mind the gap.") < now.index("# org/adapter") < now.index("## Thanks")
    # Results of the version before are not this one's.
    assert "model-index" not in now
    assert set(on(place)) == {*ADAPTER, "README.md"}


def test_a_readme_with_nothing_but_a_license_gets_the_card(place: Place, folder: Path) -> None:
    put(place, {"README.md": b"---\nlicense: mit\ntags: [finance]\n---\n"})
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    text = on(place)["README.md"].decode()
    assert "license: mit" in text
    assert "- finance\n- lora\n" in text
    assert "# org/adapter 1.0.0" in text


@pytest.mark.parametrize(
    "readme",
    [b"\xff\xfe", b"---\n[1, 2]\n---\n# x", b"---\n: : :\n\t- [\n---\ntext", b"# <!-- lora-plugins: begin --> only"],
    ids=["not-utf-8", "front-matter-list", "not-yaml", "half-a-marker"],
)
def test_a_readme_that_cannot_be_read_is_left(place: Place, folder: Path, readme: bytes) -> None:
    place.hub.create(NAME)
    if isinstance(place, LoopbackPlace):
        place.loopback.commit(NAME, {"README.md": readme})  # the client would refuse to upload some of them
    else:
        put(place, {"README.md": readme})
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    assert on(place)["README.md"] == readme


# -- looking first -------------------------------------------------------------------------------------------------


def state_of(place: Place) -> Any:
    refs = place.hub.refs(NAME)
    return refs, on(place)


def test_a_dry_run_says_what_would_happen_and_does_nothing(place: Place, folder: Path, tmp_path: Path) -> None:
    put(place, {"LICENSE": b"x", "README.md": b"# Mine"})
    before = state_of(place)
    first = push_adapter(folder, NAME, version="patch", hub=place.hub, dry_run=True)
    assert state_of(place) == before
    assert (first.version, first.created, first.dry_run) == ("0.0.1", False, True)
    assert first.changes is not None
    assert first.changes.written == tuple(sorted({*ADAPTER, "ADAPTER_CARD.md"}))
    assert first.changes.left == ("LICENSE", "README.md")

    publish(place.hub, NAME, Version("1.0"), lambda *_: draft("1.0", vocab_txt=b"a b"), force=True)
    before = state_of(place)
    second = push_adapter(adapter(tmp_path / "next", 1), NAME, version="patch", hub=place.hub, dry_run=True)
    assert state_of(place) == before
    assert second.changes is not None
    assert (second.version, second.changes.deleted) == ("1.0.1", ("vocab.txt",))
    done = push_adapter(tmp_path / "next", NAME, version="patch", hub=place.hub)
    assert done.changes == second.changes


def test_a_dry_run_makes_no_repository(place: Place, folder: Path) -> None:
    done = push_adapter(folder, NAME, version="1.0.0", hub=place.hub, dry_run=True)
    assert done.changes is not None
    assert done.changes.written == tuple(sorted({*ADAPTER, "README.md"}))
    assert list(place.hub.names()) == []


def test_a_dry_run_refuses_what_a_push_refuses(place: Place, folder: Path, tmp_path: Path) -> None:
    put(place, BASE)
    with pytest.raises(RepositoryConflict):
        push_adapter(folder, NAME, version="1.0.0", hub=place.hub, dry_run=True)
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub, force=True)
    with pytest.raises(VersionExists):
        push_adapter(adapter(tmp_path / "other", 1), NAME, version="1.0.0", hub=place.hub, dry_run=True)


# -- folders that lost their empty folders -------------------------------------------------------------------------


def drop_empty_folders(root: Path) -> int:
    """What git does to a folder that is checked in and cloned."""
    empty = [path for path in root.rglob("*") if path.is_dir() and not any(path.iterdir())]
    for path in empty:
        path.rmdir()
    return len(empty)


@pytest.mark.parametrize("first", ["1.0.0", "1.0.0rc1"])
def test_a_cloned_folder_registry_takes_releases(folder: Path, tmp_path: Path, first: str) -> None:
    place = FolderPlace(tmp_path / "registry")
    if first == "1.0.0":
        place.hub.create(NAME)
    else:
        release(place.hub, first)
    assert drop_empty_folders(place.root)
    push_adapter(folder, NAME, version="1.0.0", hub=place.hub)
    yank(f"{NAME}@1.0.0", "wrong", hub=place.hub)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    assert pull_adapter(f"{NAME}@champion", hub=place.hub).version == "1.0.0"


def test_a_cloned_folder_registry_takes_aliases_for_a_pre_release(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0rc1")
    assert drop_empty_folders(place.root)
    set_alias(f"{NAME}@1.0.0rc1", "next", hub=place.hub)
    yank(f"{NAME}@1.0.0rc1", "wrong", hub=place.hub)
    assert versions(NAME, hub=place.hub)[0].yanked == "wrong"
