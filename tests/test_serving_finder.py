"""The release that a server may serve under a name: allowed, verified, of this very base, taken by the server."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted
from finders import find_together
from hubs import BucketPlace
from pushers import context, finished

from lora_plugins.errors import InvalidServingSetting, RefusedAdapter
from lora_plugins.serving.finder import FoundRelease, ReleaseFinder, ServedBase, ServedNames, describe_base
from lora_plugins.serving.resolver_settings import ResolverSettings
from lora_plugins.serving.vllm_entry import register
from registry import (
    BaseMismatch,
    HubUnavailable,
    RegistryError,
    RepositoryNotFound,
    VersionNotFound,
    lock_adapters,
    pull_adapter,
    push_adapter,
    set_alias,
    yank,
)
from registry.errors import IntegrityError, LockMismatch
from registry.testing import LoopbackHub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a folder registry with two versions for it."""
    root = tmp_path_factory.mktemp("made")
    tiny.llama().save_pretrained(root / "base")
    for version, seed in (("1.0.0", 1), ("1.1.0", 2)):
        push(root / "base", root / "registry", version, seed)
    set_alias("org/name@1.0.0", "champion", hub=root / "registry")
    return root


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "base", tmp_path / "base")


@pytest.fixture
def registry(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that registry; the cache and the working directory are fresh."""
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made / "registry", tmp_path / "registry")


def push(base: Any, registry: Any, version: str, seed: int = 1, name: str = "org/name", **lora: Any) -> None:
    model = tiny.LlamaForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    # What others read must name a base that they can load.
    known = "org/base" if str(registry).startswith("s3://") else None
    push_adapter(adapted(model, seed, **lora), name, version=version, hub=registry, base_model=known)


def finder(registry: object, *allowed: str) -> ReleaseFinder:
    return ReleaseFinder(ResolverSettings(str(registry), allowed), "vllm")


def test_every_way_to_name_a_release_means_its_version(registry: Path, base: Path) -> None:
    found = finder(registry)
    meant = {
        "org/name": "1.1.0",
        "org/name@1.0.0": "1.0.0",
        "org/name@champion": "1.0.0",
        "org/name>=1.0,<1.1": "1.0.0",
        f"org/name@{pull_adapter('org/name@1.0.0', hub=registry).commit}": "1.0.0",
    }
    titles = {name: found.find(name, ServedBase(str(base))) for name in meant}
    assert {name: release.title for name, release in titles.items()} == {
        name: f"org/name@{version}" for name, version in meant.items()
    }
    assert len({release.number for release in titles.values()}) == 2
    assert (Path(titles["org/name"].path) / "adapter_model.safetensors").is_file()


def test_the_number_of_a_release_is_the_same_in_every_process() -> None:
    """It follows from the manifest, not from Python's hash of a text, which differs from process to process."""
    assert FoundRelease("org/name@1.0.0", "/somewhere", "0123456789abcdef" * 4).number == 200_431_807
    for digest in ("0" * 64, "f" * 64, f"{2**31 - 2:016x}" + "0" * 48):
        assert 0 < FoundRelease("org/name@1.0.0", "/somewhere", digest).number < 2**31


def test_two_releases_of_one_number_are_not_served_by_one_server(registry: Path, base: Path) -> None:
    found = finder(registry)
    first = found.find("org/name@1.0.0", ServedBase(str(base)))
    second = finder(registry).find("org/name@1.1.0", ServedBase(str(base)))
    found._numbers[second.number] = first.digest
    with pytest.raises(RefusedAdapter, match=r"org/name@1\.1\.0 has the number of another served release"):
        found.find("org/name@1.1.0", ServedBase(str(base)))


def test_another_base_of_the_same_shape_and_name_is_refused(registry: Path, base: Path) -> None:
    other = tiny.llama()
    with torch.no_grad():
        other.get_input_embeddings().weight += 0.1
    other.save_pretrained(base)
    with pytest.raises(BaseMismatch, match="Nothing was loaded"):
        finder(registry).find("org/name@1.0.0", ServedBase(str(base)))


def test_a_base_of_another_shape_is_refused(registry: Path, tmp_path: Path) -> None:
    tiny.llama(hidden_size=16).save_pretrained(tmp_path / "small")
    with pytest.raises(BaseMismatch, match="does not fit"):
        finder(registry).find("org/name@1.0.0", ServedBase(str(tmp_path / "small")))


def test_a_base_that_only_looks_right_is_refused(registry: Path, base: Path) -> None:
    """Names and shapes prove nothing: without weights at hand nobody knows whether it is the same base."""
    (base / "model.safetensors").unlink()
    with pytest.raises((RefusedAdapter, RegistryError), match=r"could not be verified|no weights|cannot be read"):
        finder(registry).find("org/name@1.0.0", ServedBase(str(base)))


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoRA is refused"),
        ({"r": 520}, "rank 520 is refused"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is refused"),
    ],
    ids=["dora", "rank", "tokens"],
)
def test_what_the_server_does_not_take_is_refused(
    lora: dict[str, Any], reason: str, registry: Path, base: Path
) -> None:
    push(base, registry, "2.0.0", **lora)
    with pytest.raises(RefusedAdapter, match=rf"org/name@2\.0\.0: vllm \(0\.33\.0\) does not serve it: {reason}"):
        finder(registry).find("org/name@2.0.0", ServedBase(str(base)))


def test_a_file_that_was_changed_is_refused(registry: Path, base: Path) -> None:
    for weights in registry.rglob("adapter_model.safetensors"):
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(data)
    with pytest.raises(IntegrityError):
        finder(registry).find("org/name@1.0.0", ServedBase(str(base)))


def test_names_that_are_not_there_are_told_from_refused_ones(registry: Path, base: Path) -> None:
    for name, error in (
        ("org/name@9.9.9", VersionNotFound),
        ("org/name@nobody", VersionNotFound),
        ("org/other", RepositoryNotFound),
    ):
        with pytest.raises(error):
            finder(registry).find(name, ServedBase(str(base)))


@pytest.mark.parametrize(
    ("registry", "allowed", "name", "expected"),
    [
        ("/srv/adapters", (), "org/name", True),
        ("s3://bucket", (), "org/name", True),
        ("https://huggingface.co", (), "org/name", False),
        ("http://127.0.0.1:1", (), "org/name", False),
        ("https://huggingface.co", ("org/name",), "org/name", True),
        ("https://huggingface.co", ("org/name",), "org/name2", False),
        ("https://huggingface.co", ("org/*",), "org/name", True),
        ("https://huggingface.co", ("org/*",), "org2/name", False),
        ("https://huggingface.co", ("*",), "org/name", True),
        ("/srv/adapters", ("org/*",), "other/name", False),
    ],
)
def test_a_public_hub_serves_no_name_that_is_not_listed(
    registry: str, allowed: tuple[str, ...], name: str, expected: bool
) -> None:
    assert ResolverSettings(registry, allowed).allows(name) is expected


def test_a_name_that_is_not_allowed_is_not_asked_for(tmp_path: Path) -> None:
    found = finder(tmp_path / "missing", "org/*")
    with pytest.raises(RefusedAdapter, match=r"other/name is not allowed. Allowed are: org/\*"):
        found.find("other/name@1.0.0", ServedBase("base"))


def test_settings_are_read_and_wrong_ones_are_named() -> None:
    assert ResolverSettings.read({}) is None
    assert ResolverSettings.read({"LORA_PLUGINS_VLLM": " "}) is None
    assert ResolverSettings.read(
        {"LORA_PLUGINS_VLLM": "/a", "LORA_PLUGINS_VLLM_ALLOW": "org/name, more/*", "LORA_PLUGINS_VLLM_REFRESH": "2.5"}
    ) == ResolverSettings("/a", ("org/name", "more/*"), 2.5)
    for name, value in (
        ("ALLOW", "org"),
        ("ALLOW", "org/na*"),
        ("ALLOW", "*/name"),
        ("REFRESH", "0"),
        ("REFRESH", "soon"),
        ("REFRESH", "inf"),
    ):
        with pytest.raises(InvalidServingSetting, match=f"LORA_PLUGINS_VLLM_{name}"):
            ResolverSettings.read({"LORA_PLUGINS_VLLM": "/a", f"LORA_PLUGINS_VLLM_{name}": value})


def test_the_lock_file_of_the_working_directory_holds(registry: Path, base: Path, tmp_path: Path) -> None:
    lock_adapters(["org/name@1.0.0"], hub=registry)
    assert (tmp_path / "adapters.lock").is_file()
    assert finder(registry).find("org/name", ServedBase(str(base))).title == "org/name@1.0.0"
    with pytest.raises(LockMismatch, match=r"adapters\.lock has org/name at 1\.0\.0"):
        finder(registry).find("org/name@1.1.0", ServedBase(str(base)))


def test_a_withdrawn_version_is_served_with_a_warning(registry: Path, base: Path) -> None:
    yank("org/name@1.0.0", "trained on the test set", hub=registry)
    found = finder(registry).find("org/name@champion", ServedBase(str(base)))
    assert found.title == "org/name@1.0.0"
    assert any("trained on the test set" in message for message in found.warnings)


def test_an_alias_that_moves_means_the_other_version(registry: Path, base: Path) -> None:
    found = finder(registry)
    assert found.find("org/name@champion", ServedBase(str(base))).title == "org/name@1.0.0"
    set_alias("org/name@1.1.0", "champion", hub=registry)
    assert found.find("org/name@champion", ServedBase(str(base))).title == "org/name@1.1.0"


def test_a_hub_that_is_down_serves_what_is_here(
    base: Path, tmp_path: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    push_to_hub(base, loopback_hub, "1.0.0")
    place = loopback_hub.endpoint
    found = finder(place, "org/*")
    first = found.find("org/name@1.0.0", ServedBase(str(base)))
    before = len(loopback_hub.requests)
    again = found.find("org/name@1.0.0", ServedBase(str(base)))
    assert (again.title, again.path) == (first.title, first.path)
    assert not any("safetensors" in request.path for request in loopback_hub.requests[before:])
    loopback_hub.faults.refuse_connection("*", times=None)
    down = finder(place, "org/*")
    stored = down.find("org/name@1.0.0", ServedBase(str(base)))
    assert stored.path == first.path
    assert any("taken from the cache" in message for message in stored.warnings), stored.warnings
    with pytest.raises(HubUnavailable):
        down.find("org/name@2.0.0", ServedBase(str(base)))


def push_to_hub(base: Path, hub: LoopbackHub, *versions: str) -> None:
    """Put a base and releases for it on a Hub."""
    hub.create_repo("org/base")
    hub.commit("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    for seed, version in enumerate(versions):
        model = adapted(tiny.LlamaForCausalLM.from_pretrained(base), seed)
        options: dict[str, Any] = {"hub": hub.endpoint, "token": hub.token, "base_model": "org/base"}
        push_adapter(model, "org/name", version=version, **options)


def test_api_servers_that_share_a_cache_find_the_same_and_leave_it_whole(
    base: Path, tmp_path: Path, loopback_hub: LoopbackHub
) -> None:
    """Each may pull for itself; one copy of a release stays, complete, under one number."""
    push_to_hub(base, loopback_hub, "1.0.0", "1.1.0")
    count, start, cache = 3, context(), tmp_path / "cache"
    barrier, results = start.Barrier(count + 1), start.Queue()
    arguments = (str(base), ["org/name@1.0.0", "org/name"], {"LORA_REGISTRY_CACHE": str(cache)}, 3)
    processes = [
        start.Process(target=find_together, args=(barrier, results, loopback_hub.endpoint, *arguments))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    for state, least, most in (("empty", 2, 2 * count), ("damaged", 1, count), ("full", 0, 0)):
        loopback_hub.requests.clear()
        barrier.wait(300)
        outcomes = [results.get(timeout=300) for _ in processes]
        assert [title for title, *_ in outcomes[0]] == ["org/name@1.0.0", "org/name@1.1.0"], outcomes[0]
        assert outcomes == [outcomes[0]] * count, outcomes
        assert sorted(path.name for path in (cache / "releases").iterdir()) == sorted(one[3] for one in outcomes[0])
        paths = [request.path for request in loopback_hub.requests if request.route == "resolve"]
        pulled = sum(path.endswith("adapter_model.safetensors") for path in paths)
        print(f"{count} resolvers, {state} cache: {pulled} downloads of weights")
        assert least <= pulled <= most, paths
        weights = Path(outcomes[0][0][2]) / "adapter_model.safetensors"
        if state == "empty":
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-1])
    assert [finished(process) for process in processes] == [0] * count


def test_a_server_takes_releases_from_a_bucket(
    bucket: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for version, seed in (("1.0.0", 1), ("1.1.0", 2)):
        push(base, bucket, version, seed)
    set_alias("org/name@1.0.0", "champion", hub=bucket)
    found, served = finder(bucket), ServedBase(str(base))
    meant = {"org/name": "1.1.0", "org/name@champion": "1.0.0", "org/name>=1.0,<1.1": "1.0.0"}
    titles = {name: found.find(name, served).title for name in meant}
    assert titles == {name: f"org/name@{version}" for name, version in meant.items()}
    set_alias("org/name@1.1.0", "champion", hub=bucket)
    assert found.find("org/name@champion", served).title == "org/name@1.1.0"
    for name, error in (("org/name@9.9.9", VersionNotFound), ("org/other", RepositoryNotFound)):
        with pytest.raises(error):
            found.find(name, served)
    yank("org/name@1.0.0", "trained on the test set", hub=bucket)
    warned = finder(bucket).find("org/name@1.0.0", served)
    assert any("trained on the test set" in message for message in warned.warnings)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    down = finder(bucket).find("org/name@1.0.0", served)
    assert down.path == warned.path
    assert any("taken from the cache" in message for message in down.warnings), down.warnings
    with pytest.raises(HubUnavailable):
        finder(bucket).find("org/name@2.0.0", served)


def test_what_was_changed_in_a_bucket_is_refused(
    bucket: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    push(base, bucket, "1.0.0")
    place = BucketPlace(bucket)
    (commit,) = set(place.hub.refs("org/name").tags.values())
    place.tamper("org/name", commit, "adapter_model.safetensors")
    with pytest.raises(IntegrityError):
        finder(bucket).find("org/name@1.0.0", ServedBase(str(base)))


def test_the_plugin_does_nothing_until_a_registry_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("LORA_PLUGINS_VLLM", "VLLM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    register()
    assert "vllm" not in sys.modules
    monkeypatch.setenv("LORA_PLUGINS_VLLM", "/srv/adapters")
    with pytest.raises(InvalidServingSetting, match="answer from the base for every name that it does not know"):
        register()


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="lora_plugins")
    assert entry.load() is register


def test_names_beyond_the_limit_take_the_place_of_missed_ones_and_of_the_oldest() -> None:
    names = ServedNames(2)
    assert names.keep("org/a", "org/a@1.0.0") is None
    assert names.keep("org/b", "org/b@1.0.0") is None
    assert names.keep("org/a", "org/a@1.1.0") is None
    assert names.keep("org/c", "org/c@1.0.0") == "org/a"
    names.miss("org/c")
    assert names.keep("org/d", "org/d@1.0.0") == "org/c"
    assert names.titles == {"org/b": "org/b@1.0.0", "org/d": "org/d@1.0.0"}


def test_a_name_is_forgotten_when_the_server_lacks_it_twice_in_a_row() -> None:
    names = ServedNames(9)
    names.keep("org/a", "org/a@1.0.0")
    names.miss("org/a")
    names.keep("org/a", "org/a@1.0.0")
    names.miss("org/a")
    assert "org/a" in names.titles
    names.miss("org/a")
    assert names.titles == {}
    names.miss("org/a")
    names.forget("org/a")


@pytest.mark.parametrize("written", ["{", "[]", '"text"', "{}{}", "\x00", None])
def test_a_base_whose_configuration_is_broken_is_refused(registry: Path, base: Path, written: str | None) -> None:
    if written is None:
        (base / "config.json").unlink()
    else:
        (base / "config.json").write_text(written)
    with pytest.raises((RefusedAdapter, RegistryError)):
        finder(registry).find("org/name@1.0.0", ServedBase(str(base)))
    with pytest.raises(RefusedAdapter, match=r"config\.json of the served base"):
        describe_base(base)


def test_a_base_in_the_home_folder_is_found(registry: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert finder(registry).find("org/name@1.0.0", ServedBase("~/base")).title == "org/name@1.0.0"
    monkeypatch.setattr(Path, "expanduser", _fail)
    with pytest.raises(RegistryError, match="the home folder is not known"):
        ServedBase("~/base").find()


def _fail(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")
