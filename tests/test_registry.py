"""The registry as people use it: one script, on a folder and on a hub, with the same results and the same errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, saved
from hubs import EVERY_KIND, BucketPlace, FolderPlace, LoopbackPlace, Place
from peft import PeftModel
from plain import put

import registry
from registry import (
    adopt,
    annotate,
    collect_garbage,
    compare_adapters,
    diagnose,
    list_adapters,
    lock_adapters,
    mirror,
    move_if_better,
    pull_adapter,
    push_adapter,
    remove_alias,
    set_alias,
    show,
    verify,
    versions,
    yank,
)
from registry.errors import RegistryError, StaleWarning, UnknownBase, YankedWarning
from registry.hubs import VARIABLE as HUB_VARIABLE
from registry.pulling.cache import VARIABLE, Cache
from registry.testing import LoopbackHub

NAME = "org/adapter"
BASE = "org/base@" + "b" * 40


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three trained adapters of one base."""
    root = tmp_path_factory.mktemp("adapters")
    return [saved(tiny.llama(), root / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture
def folder_place(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path / "registry")


@pytest.fixture
def hub_place(loopback_hub: LoopbackHub) -> LoopbackPlace:
    return LoopbackPlace(loopback_hub)


def outcome(call: Any) -> Any:
    """What a call returns, or the name of its error."""
    try:
        return call()
    except RegistryError as error:
        return type(error).__name__


def script(place: Place, folders: list[Path]) -> list[Any]:
    """Everything once; what came of each step."""
    hub = place.hub
    told: list[Any] = []

    def step(call: Any) -> None:
        told.append(outcome(call))

    def push(seed: int, version: str) -> str:
        return push_adapter(folders[seed], NAME, version=version, hub=hub, base_model=BASE).version

    def pull(behind: str = "", **options: Any) -> tuple[str, str]:
        adapter = pull_adapter(NAME + behind, hub=hub, **options)
        return adapter.version, adapter.manifest.content_digest

    step(lambda: pull())
    step(lambda: push(0, "1.0.0"))
    step(lambda: push(0, "1.0.0"))
    step(lambda: push(1, "1.0"))
    step(lambda: push(1, "minor"))
    step(lambda: push(2, "2.0.0rc1"))
    for behind in ("", "@1.0.0", "@1", "@2.0.0-rc.1", ">=1,<1.1", "~=1.0", ">=2", ">=2.0rc1", "@9", "@champion", "@@"):
        step(lambda behind=behind: pull(behind))
    step(lambda: yank(f"{NAME}@1.1.0", "wrong data", hub=hub).yanked)
    step(lambda: pull())
    with pytest.warns(YankedWarning, match="wrong data"):
        step(lambda: pull("@1.1.0"))
    step(lambda: set_alias(f"{NAME}@1.0.0", "champion", hub=hub).aliases)
    step(lambda: pull("@champion"))
    step(lambda: set_alias(f"{NAME}@2.0.0rc1", "champion", expect="1.1.0", hub=hub))
    step(lambda: set_alias(f"{NAME}@2.0.0rc1", "champion", expect="1.0.0", hub=hub).version)
    step(lambda: pull("@champion"))
    step(lambda: remove_alias(NAME, "champion", hub=hub))
    step(lambda: pull("@champion"))
    commit = hub.refs(NAME).tags["v1.0.0"]
    step(lambda: pull(f"@{commit}"))
    step(lambda: pull("@" + "0" * 40))
    step(lambda: [(each.version, each.yanked, each.prerelease) for each in versions(NAME, hub=hub)])
    step(lambda: show(NAME, hub=hub).manifest.base.id)
    step(lambda: [str(each.release) for each in list_adapters("org/base", hub=hub)])
    step(lambda: verify(NAME, hub=hub).ok)
    step(lambda: pull(frozen=True))
    step(lambda: pull(lock=True))
    step(lambda: pull("@2.0.0rc1"))
    step(lambda: pull(frozen=True))
    step(lambda: lock_adapters([f"{NAME}@2.0.0rc1"], hub=hub)[NAME].version)
    step(lambda: pull())
    place.move_tag(NAME, "v2.0.0rc1", commit)
    step(lambda: pull())
    step(lambda: pull(lock=False, behind="@2.0.0rc1"))
    place.move_tag(NAME, "v2.0.0rc1", None)
    step(lambda: pull())
    Path("adapters.lock").unlink()
    step(lambda: pull())
    Cache().record_path(hub.location, NAME).unlink()  # the way out that the error names
    step(lambda: push(2, "1.2.0"))
    place.tamper(NAME, hub.refs(NAME).tags["v1.2.0"], "adapter_model.safetensors")
    step(lambda: pull())
    step(lambda: len(verify(NAME, hub=hub).problems))
    step(lambda: pull("<1.2"))
    place.delete(NAME)
    step(lambda: pull())
    # Other bytes: the same ones, pushed within the same second, would be the same commit of a folder.
    step(lambda: push(1, "1.0.0"))
    step(lambda: pull("@1.0.0"))
    return told


@pytest.mark.parametrize("kind", ["loopback", "bucket"])
def test_one_script_on_every_kind_of_hub(
    kind: str, folder_place: FolderPlace, folders: list[Path], request: pytest.FixtureRequest
) -> None:
    other = "hub_place" if kind == "loopback" else "bucket"
    found = request.getfixturevalue(other)
    told = [script(place, folders) for place in (folder_place, found if kind == "loopback" else BucketPlace(found))]
    assert told[0] == told[1]
    kinds = [
        each if isinstance(each, str) else each[0] if isinstance(each, tuple) and each else each for each in told[0]
    ]
    assert kinds == [
        "RepositoryNotFound", "1.0.0", "1.0.0", "VersionExists", "1.1.0", "2.0.0rc1",
        "1.1.0", "1.0.0", "1.0.0", "2.0.0rc1", "1.0.0", "1.1.0", "VersionNotFound", "2.0.0rc1", "VersionNotFound",
        "AliasNotFound", "InvalidReference",
        "wrong data", "1.0.0", "1.1.0",
        "champion", "1.0.0", "AliasMoved", "2.0.0rc1", "2.0.0rc1", None, "AliasNotFound", "1.0.0", "NotAdapter",
        [("1.0.0", None, False), ("1.1.0", "wrong data", False), ("2.0.0rc1", None, True)],
        "org/base", [f"{NAME}@1.0.0"], True,
        "LockEntryNotFound", "1.0.0", "LockMismatch", "1.0.0", "2.0.0rc1", "2.0.0rc1",
        "ReleaseMoved", "ReleaseMoved", "ReleaseMoved", "ReleaseMoved",
        "1.2.0", "IntegrityError", 1, "1.0.0",
        "RepositoryNotFound", "1.0.0", "RepositoryReplaced",
    ]  # fmt: skip


def script_of_files(place: Place, folders: list[Path], target: Path) -> list[Any]:
    """Adapters that nobody published, and what is done with versions later; what came of each step."""
    hub, told, digests = place.hub, [], []
    plain = "org/plain"

    def step(call: Any) -> None:
        told.append(outcome(call))

    def put_files(seed: int, below: str = "", branch: str = "main") -> str:
        files = {f"{below}{path.name}": path.read_bytes() for path in folders[seed].iterdir()}
        return put(place, files, name=plain, branch=branch)

    def pull(reference: str, **options: Any) -> Any:
        adapter = pull_adapter(reference, hub=hub, **options)
        if adapter.manifest.content_digest not in digests:
            digests.append(adapter.manifest.content_digest)
        return adapter.unversioned, digests.index(adapter.manifest.content_digest)

    def examine(reference: str, **options: Any) -> list[str]:
        return [symptom.check for symptom in diagnose(reference, hub=hub, **options).symptoms]

    def take(source: str, **options: Any) -> list[str]:
        return [str(done.published) for done in adopt(
            source, "org/adopted", version="1.0.0", hub=hub, source_hub=hub, base_model=BASE, **options)]  # fmt: skip

    def move(version: str, metric: str = "eval_loss") -> Any:
        moved = move_if_better(f"{NAME}@{version}", "best", metric, hub=hub)
        return moved.moved, moved.standing, moved.before, moved.after

    first = put_files(0)
    head = put_files(1, "best/")
    put_files(2, branch="dev")
    forms = (
        "", "@main", "@branch:main", "@dev", "@branch:dev", "/best@main", f"/best@{head}", "/best", "/other@main",
        f"@{first}", "@" + "0" * 40, "@refs/pr/9", "@nothing", "@branch:nothing", "@1.0.0", ">=1",
    )  # fmt: skip
    for form in forms:
        step(lambda form=form: pull(plain + form, lock=False))
        step(lambda form=form: examine(plain + form))
    step(lambda: show(f"{plain}/best@main", hub=hub).manifest.base.id)
    step(lambda: verify(f"{plain}@{first}", hub=hub).ok)
    step(lambda: pull(f"{plain}/best@main", lock="plain.lock"))
    put_files(2, "best/")
    step(lambda: pull(f"{plain}/best@main", lock="plain.lock", frozen=True))
    step(lambda: pull(f"{plain}/best@main", lock=False))
    step(lambda: set_alias(f"{plain}@main", "champion", hub=hub))
    step(lambda: yank(f"{plain}@main", "bad", hub=hub))
    step(lambda: [copied.created for copied in mirror(f"{plain}/best@main", target, hub=hub)])
    step(lambda: take(plain, dry_run=True))
    step(lambda: take(f"{plain}/other@main"))
    step(lambda: take(plain))
    step(lambda: take(plain))
    step(lambda: take(f"{plain}@dev"))
    step(lambda: take("org/adopted@1.0.0"))
    step(lambda: pull("org/adopted"))
    step(lambda: examine("org/adopted"))

    for seed, version in enumerate(("1.0.0", "1.1.0", "1.2.0")):
        metrics = {"eval_loss": (0.5, 0.25, 0.375)[seed]}
        push_adapter(folders[seed], NAME, version=version, hub=hub, base_model=BASE, metrics=metrics)
    for version in ("1.0.0", "1.1.0", "1.2.0", "9"):
        step(lambda version=version: move(version))
    step(lambda: move("1.2.0", "accuracy"))
    step(lambda: annotate(f"{NAME}@best", "measured", add_tags=["reviewed"], hub=hub).tags)
    step(lambda: annotate(f"{NAME}@1.1.0", "two\nlines", hub=hub).note)
    step(lambda: annotate(NAME, "which", hub=hub))
    step(lambda: [str(each.release) for each in list_adapters(search="adapter", hub=hub)])
    step(lambda: [(each.version, each.note) for each in versions(NAME, hub=hub) if each.note])
    two = [pull_adapter(f"{NAME}@{version}", hub=hub, lock=False) for version in ("1.0.0", "1.1.0")]
    step(lambda: compare_adapters(*two).after)
    step(lambda: [each.version for each in mirror(NAME, target, hub=hub)])
    step(lambda: pull_adapter(f"{NAME}@best", hub=target, lock=False).version)
    step(lambda: collect_garbage(hub, dry_run=False).problems)
    step(lambda: pull(f"{NAME}@best", lock=False))
    return told


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_script_of_files_and_of_versions_on_every_kind_of_hub(
    kind: str, folders: list[Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = {
        "folder": lambda: FolderPlace(tmp_path / "registry"),
        "loopback": lambda: LoopbackPlace(request.getfixturevalue("loopback_hub")),
        "bucket": lambda: BucketPlace(request.getfixturevalue("bucket")),
    }[kind]()
    told, ok = script_of_files(place, folders, tmp_path / "copy"), ["no-base"]
    assert told == [
        "NotAdapter", ok, (True, 0), ok, (True, 0), ok, (True, 1), ok, (True, 1), ok, (True, 2), ok, (True, 2), ok,
        "NotAdapter", ok, "NotAdapter", "NotAdapter", (True, 0), ok, "NotAdapter", "NotAdapter",
        "VersionNotFound", "VersionNotFound", "AliasNotFound", "AliasNotFound", *["VersionNotFound"] * 6,
        None, True, (True, 2), (True, 2), (True, 1), "NotAdapter", "NotAdapter", [True],
        ["org/adopted@1.0.0"], "NotAdapter", ["org/adopted@1.0.0"], ["org/adopted@1.0.0"], "VersionExists",
        "NotAdapter",
        (False, 3), [],
        (True, None, None, 0.5), (True, "1.0.0", 0.5, 0.25), (False, "1.1.0", 0.25, 0.375), "VersionNotFound",
        "MetricNotFound", ("reviewed",), "InvalidReference", "InvalidReference", [f"{NAME}@1.2.0"],
        [("1.1.0", "measured")], f"{NAME}@1.1.0", ["1.0.0", "1.1.0", "1.2.0"], "1.1.0", (), (False, 4),
    ]  # fmt: skip


# -- models --------------------------------------------------------------------------------------------------------


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def test_a_model_there_and_back(folder_place: FolderPlace) -> None:
    model = adapted(tiny.llama(), seed=3)
    expected = logits(model)
    done = push_adapter(model, NAME, version="0.1.0", hub=folder_place.hub, base_model=BASE, metrics={"loss": 0.5})
    assert done.manifest.metrics == {"loss": 0.5}
    adapter = pull_adapter(NAME, hub=folder_place.hub)
    assert (adapter.version, adapter.name, adapter.commit) == ("0.1.0", NAME, done.commit)
    for loaded in (adapter.load(tiny.llama()), PeftModel.from_pretrained(tiny.llama(), adapter)):
        assert torch.equal(logits(loaded), expected)
    assert not torch.equal(logits(tiny.llama()), expected)


def test_what_cannot_be_used_is_not_uploaded(hub_place: LoopbackPlace, folders: list[Path]) -> None:
    with pytest.raises(UnknownBase):
        push_adapter(folders[0], NAME, version="1.0.0", hub=hub_place.hub)
    assert hub_place.loopback.requests == []


def test_a_plain_peft_user_loads_a_release_from_the_hub(
    hub_place: LoopbackPlace, folders: list[Path], tmp_path: Path
) -> None:
    """In a process without this package's paths, by the stock client."""
    for seed, version in enumerate(["1.0.0", "1.1.0"]):
        push_adapter(folders[seed], NAME, version=version, hub=hub_place.hub, base_model=BASE)
    tiny.llama().save_pretrained(tmp_path / "base")
    code = f"""
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
import torch
for revision in ("v1.0.0", None):
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = PeftModel.from_pretrained(base, "org/adapter", revision=revision, token=False)
    torch.save(model(torch.arange(12)[None]).logits, {str(tmp_path)!r} + f"/{{revision}}.pt")
assert "registry" not in sys.modules
"""
    environment = {
        **os.environ, "HF_ENDPOINT": hub_place.loopback.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for seed, revision in enumerate(["v1.0.0", None]):
        ours = PeftModel.from_pretrained(tiny.llama(), folders[seed])
        assert torch.equal(torch.load(tmp_path / f"{revision}.pt"), logits(ours))


# -- without a network ---------------------------------------------------------------------------------------------


def test_no_socket_without_a_hub(
    folder_place: FolderPlace, folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Saving, pushing to a folder, pulling from it, from the cache and from a lock, looking and cleaning up."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv(HUB_VARIABLE, folder_place.hub.location)
    model = adapted(tiny.llama(), seed=1)
    model.save_pretrained(tmp_path / "saved")
    push_adapter(model, NAME, version="1.0.0", base_model=BASE)
    push_adapter(folders[2], NAME, version="patch", base_model=BASE)
    for options in ({"lock": True}, {"frozen": True}, {"offline": True}, {"local_files_only": True}):
        assert pull_adapter(NAME, **options).version == "1.0.1"
    adapter = pull_adapter(f"{NAME}@1.0", lock=False)
    assert torch.equal(logits(adapter.load(tiny.llama())), logits(model))
    set_alias(f"{NAME}@1.0.0", "champion")
    assert verify(f"{NAME}@champion").ok
    assert [str(each.release) for each in list_adapters()] == [f"{NAME}@1.0.1"]
    mirror(NAME, tmp_path / "copy")
    assert collect_garbage().paths == ()


def test_a_hub_that_was_there(hub_place: LoopbackPlace, folders: list[Path]) -> None:
    push_adapter(folders[0], NAME, version="1.0.0", hub=hub_place.hub, base_model=BASE)
    pull_adapter(NAME, hub=hub_place.hub, lock=True)
    endpoint = hub_place.loopback.endpoint
    hub_place.loopback.close()
    assert pull_adapter(NAME, hub=endpoint, token=False, offline=True).version == "1.0.0"
    assert pull_adapter(NAME, hub=endpoint, token=False, frozen=True, local_files_only=True).version == "1.0.0"
    with pytest.warns(StaleWarning, match="taken from the cache"):
        assert pull_adapter(NAME, hub=registry.HuggingFaceHub(endpoint, False, timeout=0.3)).version == "1.0.0"


# -- the package ---------------------------------------------------------------------------------------------------


def test_names_are_what_they_say() -> None:
    assert registry.__all__ == sorted(set(registry.__all__))
    for name in registry.__all__:
        found = getattr(registry, name)
        assert not isinstance(found, types.ModuleType)
        assert name in dir(registry)
    with pytest.raises(AttributeError, match="no attribute 'push_adaptor'"):
        _ = registry.push_adaptor


def test_no_name_is_hidden_by_a_module() -> None:
    modules = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    assert not modules & set(registry.__all__)


def test_nothing_heavy_is_loaded_for_a_folder(folder_place: FolderPlace, folders: list[Path]) -> None:
    push_adapter(folders[0], NAME, version="1.0.0", hub=folder_place.hub, base_model=BASE)
    code = (
        "import json, sys; from registry import pull_adapter, verify, versions;"
        "a = pull_adapter('org/adapter'); versions('org/adapter'); verify('org/adapter');"
        "heavy = ('torch', 'transformers', 'peft', 'huggingface_hub', 'httpx');"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    environment = {**os.environ, HUB_VARIABLE: folder_place.hub.location}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
