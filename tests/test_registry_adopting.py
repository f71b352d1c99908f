"""Adapters that other tools saved, in twenty layouts and more: pulled, adopted, or refused with the way on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from peft import PeftModel
from plain import put, put_request
from safetensors.torch import load, load_file, save
from torch import nn
from transformers import AutoModelForCausalLM

from lora_plugins import merge_and_save, plan, prepare_model
from registry import Adopted, adopt, pull_adapter, push_adapter, show, versions
from registry.adopting import pickles, unpickle
from registry.adopting.layouts import find_renames, rewrite
from registry.checks import names
from registry.checks.adapter_files import AdapterFiles
from registry.errors import (
    BaseMismatch,
    HubRefused,
    HubUnavailable,
    IntegrityError,
    InvalidAdapter,
    InvalidReference,
    NotAdapter,
    RegistryError,
    RepositoryConflict,
    UnknownBase,
    UnsafeFile,
    VersionNotFound,
)
from registry.hubs.folder import FolderHub
from registry.testing import LoopbackHub

PLAIN, NAME = "org/plain", "org/adopted"
BASE = f"org/base@{'b' * 40}"
CARD = (
    b"---\nlicense: apache-2.0\ndatasets: [org/data]\nlanguage: en\npipeline_tag: text-generation\n---\n# My adapter\n"
)

Files = dict[str, bytes]


@dataclass(frozen=True)
class Made:
    """An adapter as PEFT writes it, and what it computes."""

    files: Files
    tensors: dict[str, torch.Tensor]
    logits: torch.Tensor
    model: PeftModel


def make(folder: Path, **lora: Any) -> Made:
    base = tiny.llama()
    base.name_or_path = "org/base"
    model = adapted(base, **lora)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(folder, save_embedding_layers=False)
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    return Made(
        files, load(files["adapter_model.safetensors"]), compute(PeftModel.from_pretrained(tiny.llama(), folder)), model
    )


@torch.no_grad()
def compute(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.arange(12)[None]).logits
    return logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


def take(source: Any, place: Place, name: str = NAME, **options: Any) -> Adopted:
    [done] = adopt(
        source, name, version="1.0.0", hub=place.hub, source_hub=place.hub, **{"base_model": BASE, **options}
    )
    return done


def assert_loads(place: Place, made: Made, name: str = NAME) -> None:
    """What was adopted is the adapter that PEFT wrote: tensor by tensor, and in what it computes."""
    adapter = pull_adapter(name, hub=place.hub)
    held = load_file(Path(adapter) / "adapter_model.safetensors")
    assert held.keys() == made.tensors.keys()
    assert all(torch.equal(held[key], made.tensors[key]) for key in held)
    assert torch.equal(compute(adapter.load(tiny.llama(), trust_identity=True)), made.logits)


def renamed(files: Mapping[str, bytes], change: Callable[[str], str]) -> Files:
    tensors = load(files["adapter_model.safetensors"])
    return {**files, "adapter_model.safetensors": save({change(k): v for k, v in tensors.items()})}


def pickled(files: Mapping[str, bytes], *, legacy: bool = False, wrapped: bool = False) -> Files:
    tensors = load(files["adapter_model.safetensors"])
    content = io.BytesIO()
    torch.save({"state_dict": tensors} if wrapped else tensors, content, _use_new_zipfile_serialization=not legacy)
    return {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": content.getvalue()}


def configured(files: Mapping[str, bytes], **changes: Any) -> Files:
    return {
        **files,
        "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **changes}).encode(),
    }


# -- layouts of repositories that are pulled as they are, and adopted ------------------------------------------------

SOUND: dict[str, Callable[[Place, Files], str]] = {
    "at the top": lambda place, files: f"{PLAIN}@{put(place, files)}",
    "bare": lambda place, files: put(place, files) and PLAIN,
    "main": lambda place, files: put(place, files) and f"{PLAIN}@main",
    "branch": lambda place, files: put(place, files, branch="epoch-3") and f"{PLAIN}@epoch-3",
    "folder": lambda place, files: f"{PLAIN}/best@{put(place, {f'best/{k}': v for k, v in files.items()})}",
    "nested": lambda place, files: put(place, {f"a/b/{k}": v for k, v in files.items()}) and f"{PLAIN}/a/b@main",
    "beside others": lambda place, files: (
        put(place, {**files, "optimizer.pt": b"x", "runs/x": b"y"}) and f"{PLAIN}@main"
    ),
    "foreign tags": lambda place, files: f"{PLAIN}@{tagged(place, files)}",
}


def tagged(place: Place, files: Files) -> str:
    commit = put(place, files)
    place.hub.create_tag(PLAIN, "v9.0.0", commit)
    return commit


@pytest.mark.parametrize("layout", SOUND)
def test_a_sound_layout_is_pulled_and_adopted(place: Place, made: Made, layout: str) -> None:
    source = SOUND[layout](place, made.files)
    if layout == "bare":
        with pytest.raises(VersionNotFound, match="lora-plugins adopt"):
            pull_adapter(source, hub=place.hub)
    else:
        pulled = pull_adapter(source, hub=place.hub)
        assert torch.equal(compute(pulled.load(tiny.llama(), trust_identity=True)), made.logits)
        result = pulled.check(tiny.llama())
        assert (result.identity, "no fingerprint recorded" in result.details) == ("unverified", True)
    done = take(source, place)
    assert (done.renamed, done.dropped, done.changes, done.license) == ({}, (), (), None)
    facts = done.published.manifest.training["adopted"]
    assert facts["repository"] == PLAIN
    assert len(facts["commit"]) in (40, 64)
    assert_loads(place, made)


def test_a_change_request_and_a_renamed_repository(loopback_hub: LoopbackHub, made: Made) -> None:
    place = LoopbackPlace(loopback_hub)
    ref = put_request(place, made.files)
    assert pull_adapter(f"{PLAIN}@{ref}", hub=place.hub).unversioned
    take(f"{PLAIN}@{ref}", place)
    assert_loads(place, made)
    commit = put(place, made.files, name="org/old")
    loopback_hub.rename_repo("org/old", "org/new")
    assert pull_adapter(f"org/old@{commit}", hub=place.hub).commit == commit
    take("org/old@main", place, "org/from-renamed")
    assert_loads(place, made, "org/from-renamed")


def test_a_gated_base_is_recorded_and_a_gated_adapter_says_so(loopback_hub: LoopbackHub, made: Made) -> None:
    place = LoopbackPlace(loopback_hub)
    base = loopback_hub.create_repo("org/gated", gated=True)
    loopback_hub.commit("org/gated", {"config.json": tiny.llama().config.to_json_string().encode()})
    commit = base.branches["main"]
    put(place, configured(made.files, base_model_name_or_path="org/gated", revision="main"))
    other = loopback_hub.add_user("stranger", orgs=["lab"])
    stranger = LoopbackPlace(loopback_hub)
    stranger.hub = type(place.hub)(loopback_hub.endpoint, other.token, 5)
    [done] = adopt(PLAIN, "lab/adopted", version="1.0.0", hub=stranger.hub, base_model=f"org/gated@{commit}")
    assert (done.published.manifest.base.id, done.published.manifest.base.commit) == ("org/gated", commit)
    assert_loads(stranger, made, "lab/adopted")
    loopback_hub.repo(PLAIN).gated = True
    with pytest.raises(HubRefused, match="gated; ask for access"):
        adopt(f"{PLAIN}@main", "lab/other", version="1.0.0", hub=stranger.hub)


def test_plan_merge_and_training_take_an_unversioned_adapter(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, commit = FolderPlace(tmp_path / "registry"), ""
    commit = put(place, {f"best/{name}": data for name, data in made.files.items()})
    monkeypatch.setenv("LORA_REGISTRY", str(tmp_path / "registry"))
    tiny.llama().save_pretrained("base")
    reference = f"{PLAIN}/best@{commit}"
    planned = plan("./base", adapter=reference)
    assert planned.trainable == sum(tensor.numel() for tensor in made.tensors.values())
    merge_and_save(reference, "merged", "same", base="./base", quantization="none", probe=None)
    merged = compute(AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32))
    assert torch.allclose(merged, made.logits, atol=1e-5)
    prepared = prepare_model(tiny.llama(), adapter=f"{PLAIN}/best@main")
    assert torch.allclose(compute(prepared), made.logits, atol=1e-5)


# -- older layouts of names ------------------------------------------------------------------------------------------

OLDER: dict[str, tuple[Callable[[str], str], str]] = {
    "without the prefix": (lambda name: name.removeprefix("base_model.model."), "without the prefix"),
    "twice the prefix": (lambda name: "base_model.model." + name, "prefix twice"),
    "compiled": (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "compiled"),
    "distributed": (lambda name: f"module.{name}", "DistributedDataParallel"),
    "sharded": (lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), "FSDP"),
    "recomputed": (lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"), "checkpointing"),
    "named": (lambda name: name.replace(".weight", ".default.weight"), "adapter's name"),
    "wrapped inside": (lambda name: name.replace("base_model.model.", "base_model.model.module."), "several processes"),
    "loralib": (lambda name: name.removesuffix(".weight"), "loralib"),
    "down and up": (lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "down and up"),
    "several at once": (
        lambda name: "module._orig_mod." + name.removeprefix("base_model.model.").replace(".weight", ".best.weight"),
        "compiled",
    ),
}


@pytest.mark.parametrize("layout", OLDER)
def test_names_of_an_older_layout_are_rewritten_and_listed(loopback_hub: LoopbackHub, made: Made, layout: str) -> None:
    place, (change, reason) = LoopbackPlace(loopback_hub), OLDER[layout]
    commit = put(place, renamed(made.files, change))
    with pytest.raises((InvalidAdapter, BaseMismatch), match=r"lora-plugins adopt|have no place"):
        pull_adapter(f"{PLAIN}@{commit}", hub=place.hub).check(tiny.llama())
    done = take(PLAIN, place)
    assert done.renamed == {change(name): name for name in made.tensors}
    assert any(reason in change for change in done.changes)
    files = AdapterFiles(Path(pull_adapter(NAME, hub=place.hub)))
    assert [found for check in names.CHECKS for found in check.examine(files)] == []  # nothing is left for doctor
    assert done.published.manifest.training["adopted"]["changes"] == list(done.changes)
    assert_loads(place, made)


def test_a_saved_module_is_found_and_the_bases_copy_left_out(place: Place, tmp_path: Path) -> None:
    sound = make(tmp_path / "saved", modules_to_save=["lm_head"])
    # torch.save(model.state_dict()) of a wrapped model, cut to what training touched.
    state = {k: v.clone() for k, v in sound.model.state_dict().items() if "lora_" in k or "lm_head" in k}
    put(place, {**sound.files, "adapter_model.safetensors": save(state)})
    done = take(PLAIN, place)
    assert done.dropped == ("base_model.model.lm_head.original_module.weight",)
    assert done.renamed["base_model.model.lm_head.modules_to_save.default.weight"] == "base_model.model.lm_head.weight"
    assert_loads(place, sound)


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(InvalidAdapter, match="several adapters"):
        find_renames(["base_model.model.q.lora_A.one.weight", "base_model.model.q.lora_A.two.weight"])
    found = find_renames(["base_model.model.q.lora_A.weight", "base_model.model.default.lora_B.weight"])
    assert not found


def test_rewriting_keeps_every_byte(tmp_path: Path) -> None:
    tensors = {
        "a.lora_A.weight": torch.randn(2, 3).bfloat16(),
        "a.original_module.weight": torch.randn(5, dtype=torch.float64),
        "a.lora_B.weight": torch.randn(3, 2).half(),
    }
    (tmp_path / "one").write_bytes(save(tensors))
    rewrite(tmp_path / "one", tmp_path / "two", find_renames(tensors))
    held = load_file(tmp_path / "two")
    assert held.keys() == {"base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"}
    assert all(torch.equal(held[f"base_model.model.{k}"], v) for k, v in tensors.items() if "lora" in k)


# -- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"legacy": True}, {"wrapped": True}])
def test_a_pickle_is_converted_on_request_only(loopback_hub: LoopbackHub, made: Made, kind: dict[str, bool]) -> None:
    place = LoopbackPlace(loopback_hub)
    put(place, pickled(made.files, **kind))
    with pytest.raises(UnsafeFile, match="--from-pickle"):
        pull_adapter(f"{PLAIN}@main", hub=place.hub)
    with pytest.raises(UnsafeFile, match="from_pickle=True"):
        take(PLAIN, place)
    done = take(PLAIN, place, from_pickle=True)
    assert done.changes == ("weights converted from the pickle adapter_model.bin",)
    assert_loads(place, made)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/lora-plugins-was-here",)


def bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10_000_000)
    return content.getvalue()


def saved_as(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (saved_as({"base_model.model.x": Evil()}), "weights_only=True"),
        (bomb(), "a compressed archive"),
        (b"not a pickle", "cannot be converted"),
    ],
    # Bytes as ids hold the time at which they were made: two processes would collect different tests.
    ids=["code", "bomb", "noise"],
)
def test_a_hostile_pickle_is_refused(tmp_path: Path, made: Made, content: bytes, says: str) -> None:
    place = FolderPlace(tmp_path / "registry")
    folder = write(tmp_path / "evil", {**made.files, "adapter_model.bin": content})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsafeFile, match=says):
        take(folder, place, from_pickle=True)
    assert not Path("/tmp/lora-plugins-was-here").exists()
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 2], "it holds a list"),
        ({}, "it holds a dict"),
        ({"model": {"y": 1}}, "'y' is a int, not a dense tensor"),
        ({1: torch.zeros(1)}, "'1' is a Tensor"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "not a dense tensor"),
        ({"x": torch.zeros(1).expand(2**40)}, "its tensors take 4,398,046,511,104 bytes"),
        ({"state_dict": {"x": torch.zeros(100)}}, ""),
    ],
)
def test_only_tensors_by_name_are_written(value: Any, says: str) -> None:
    wrong = unpickle._find_wrong(unpickle._unwrap(value), 1000)
    assert says in wrong
    assert bool(says) == bool(wrong)


def test_the_converting_process_has_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(command: list[str], **options: Any) -> Any:
        seen.update(options)
        return subprocess.CompletedProcess(command, 2, b"\x1b[31mno\n", b"")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(subprocess, "run", record)
    (tmp_path / "x.bin").write_bytes(b"\x80x")  # as a pickle begins
    with pytest.raises(UnsafeFile, match=r"cannot be converted: .*no") as caught:
        pickles.convert(tmp_path / "x.bin", tmp_path / "y", "x.bin")
    assert str(caught.value).isprintable()
    assert "hf_secret" not in str(seen["env"])
    assert Path(seen["env"]["HOME"]) == Path(seen["cwd"])


# -- folders, checkpoints and the Hub's cache ------------------------------------------------------------------------


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_checkpoint_brings_what_its_trainer_noted(place: Place, made: Made, tmp_path: Path) -> None:
    state = {"global_step": 7, "epoch": 1.0, "log_history": [{"eval_loss": 0.5, "step": 7}]}
    write(tmp_path / "run/checkpoint-7", {**made.files, "trainer_state.json": json.dumps(state).encode()})
    done = take(tmp_path / "run" / "checkpoint-7", place)
    assert done.published.manifest.training["steps"] == 7
    assert done.published.manifest.metrics == {"eval_loss": 0.5}
    assert str(tmp_path) not in done.published.manifest.to_bytes().decode()
    assert_loads(place, made)


def link_cache(root: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let huggingface_hub fill its cache, in a process of its own: it reads its settings when it is imported."""
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({PLAIN!r}))"
    environment = {**os.environ, "HF_ENDPOINT": loopback.endpoint, "HF_HUB_CACHE": str(root), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": loopback.token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_the_hubs_cache_is_adopted_with_its_links(
    loopback_hub: LoopbackHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = LoopbackPlace(loopback_hub)
    commit = put(place, {**made.files, **{f"best/{k}": v for k, v in made.files.items()}, "README.md": CARD})
    snapshot = link_cache(tmp_path / "hub", loopback_hub, monkeypatch)
    assert (snapshot / "adapter_model.safetensors").is_symlink()
    with pytest.raises(UnsafeFile, match="symbolic link"):
        push_adapter(snapshot, NAME, version="1.0.0", hub=place.hub)
    for number, given in enumerate((snapshot, snapshot.parent.parent, snapshot / "best")):
        name = f"{NAME}-{number}"
        done = take(given, place, name)
        facts = done.published.manifest.training["adopted"]
        assert (facts["repository"], facts["commit"]) == (PLAIN, commit)
        assert facts.get("folder") == ("best" if given.name == "best" else None)
        assert_loads(place, made, name)
    assert take(snapshot, place, f"{NAME}-0").license == "apache-2.0"
    secret = write(tmp_path / "secret", {"x": b"key"}) / "x"
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(secret)
    with pytest.raises(UnsafeFile, match="not one of the files of its repository"):
        take(snapshot, place, "org/other")
    (snapshot / "README.md").unlink()
    blob = Path(os.path.realpath(snapshot / "adapter_model.safetensors"))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match="download it again"):
        take(snapshot, place, "org/other")
    with pytest.raises(VersionNotFound):
        show("org/other", hub=place.hub) if "org/other" in place.hub.names() else (_ for _ in ()).throw(VersionNotFound)


def test_a_link_in_a_plain_folder_is_refused(tmp_path: Path, made: Made) -> None:
    place = FolderPlace(tmp_path / "registry")
    folder = write(tmp_path / "adapter", made.files)
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        take(folder, place)


def test_a_folder_or_a_name_is_asked_for(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderPlace(tmp_path / "registry")
    write(Path("run/best"), made.files)
    with pytest.raises(InvalidReference, match=r"\./run/best for the folder"):
        take("run/best", place)
    take("./run/best", place)
    with pytest.raises(InvalidAdapter, match="adapters in run/best: name one of them, or take all"):
        take(".", place)


def test_a_reference_that_the_hub_does_not_have_names_the_option_for_another_registry(tmp_path: Path) -> None:
    """Offline, and the registry that is published in is a folder, which is not searched."""
    with pytest.raises(HubUnavailable, match=r"org/plain@main was looked up on the Hugging Face Hub: --from-hub"):
        adopt("org/plain@main", "org/name", version="1.0.0", hub=tmp_path)


# -- several at once -------------------------------------------------------------------------------------------------


def test_all_adapters_of_a_repository_are_adopted_at_once(place: Place, made: Made) -> None:
    put(place, {**made.files, **{f"{f}/{k}": v for f in ("epoch 1", "b/c") for k, v in made.files.items()}})
    options: dict[str, Any] = {"version": "1.0.0", "hub": place.hub, "source_hub": place.hub, "base_model": BASE}
    planned = adopt(PLAIN, NAME, every=True, dry_run=True, **options)
    expected = [NAME, f"{NAME}-b-c", f"{NAME}-epoch-1"]
    assert [(each.published.name, each.published.dry_run) for each in planned] == [(name, True) for name in expected]
    done = adopt(PLAIN, NAME, every=True, **options)
    assert [each.published.name for each in done] == expected
    for name in expected:
        assert_loads(place, made, name)
    again = adopt(PLAIN, NAME, every=True, **options)
    assert [each.published.created for each in again] == [False] * 3


def test_of_several_all_or_none_are_published(place: Place, made: Made) -> None:
    put(place, {**{f"a/{k}": v for k, v in made.files.items()}, "b/adapter_config.json": b"{}", **{
        f"c/{k}": v for k, v in pickled(made.files).items()
    }})  # fmt: skip
    options: dict[str, Any] = {"version": "1.0.0", "hub": place.hub, "source_hub": place.hub, "base_model": BASE}
    with pytest.raises(InvalidAdapter, match=r"2 of 3 adapters .* b: .* c: .*--from-pickle.*skip=\['b', 'c'\]"):
        adopt(PLAIN, NAME, every=True, **options)
    with pytest.raises(RegistryError):
        versions(f"{NAME}-a", hub=place.hub)
    [done] = adopt(PLAIN, NAME, every=True, skip=["b", "c"], **options)
    assert done.published.name == f"{NAME}-a"


# -- cards, licences, configurations, repositories -------------------------------------------------------------------


def test_licence_and_card_come_with_their_origin(place: Place, made: Made) -> None:
    hostile = CARD + b"<script>alert(1)</script>\n<!-- lora-plugins: end -->\n```\n[x](javascript:x)\x1b[31m\n````\n"
    put(place, {**made.files, "README.md": hostile, "LICENSE": b"Apache License\n  Version 2.0\n"})
    done = take(PLAIN, place)
    assert done.license == "apache-2.0"
    card = (Path(pull_adapter(NAME, hub=place.hub)) / "README.md").read_text()
    front = card.split("---\n")[1]
    assert all(text in front for text in ("license: apache-2.0", "org/data", "language", "text-generation"))
    assert f"From: repository `{PLAIN}`, commit" in card
    assert "Licence of the original: `apache-2.0`, as its card states" in card
    quoted = card[card.index("### The original's card") :]
    assert quoted.splitlines()[2] == "`````text"
    assert "Apache License\n  Version 2.0" in quoted
    assert card.count("<!-- lora-plugins: end -->") == 1
    assert "\x1b" not in card
    assert take(PLAIN, place, "org/two", license="mit").license == "mit"
    other = (Path(pull_adapter("org/two", hub=place.hub)) / "README.md").read_text()
    assert "the publisher of this version names `mit`" in other


@pytest.mark.parametrize(
    "card",
    [b"---\nlicense: [1\n---\nx", b"---\nlicense: {a: b}\nlanguage: 7\n---\n", b"\xff\xfe", b"---\n- a\n---\n", b""],
)
def test_a_card_that_cannot_be_read_states_no_licence(tmp_path: Path, made: Made, card: bytes) -> None:
    place = FolderPlace(tmp_path / "registry")
    done = take(write(tmp_path / "adapter", {**made.files, "README.md": card}), place)
    assert done.license is None
    assert "not stated by its card" in (Path(pull_adapter(NAME, hub=place.hub)) / "README.md").read_text()


def test_an_adapter_is_adopted_in_its_own_repository(place: Place, made: Made) -> None:
    put(place, {**made.files, "README.md": CARD, "notes.txt": b"mine"})
    done = take(PLAIN, place, PLAIN)
    assert "notes.txt" in place.hub.files(PLAIN, done.published.commit)
    assert pull_adapter(PLAIN, hub=place.hub).version == "1.0.0"
    assert b"# My adapter" in place.hub.read(PLAIN, done.published.commit, "README.md", 10_000)
    with pytest.raises(NotAdapter, match="is published already"):
        take(PLAIN, place, "org/other")


def test_another_adapters_repository_is_left_alone(place: Place, made: Made, tmp_path: Path) -> None:
    put(place, made.files)
    put(place, configured(made.files, lora_alpha=3), name="org/other")
    with pytest.raises(RepositoryConflict):
        take(PLAIN, place, "org/other")


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        ({"base_model_name_or_path": "/root/models/llama"}, {"base_model": None}, UnknownBase, "base_model="),
        ({"base_model_name_or_path": None}, {"base_model": None}, UnknownBase, "base_model="),
        ({"peft_type": "IA3"}, {}, UnsafeFile, "'LORA'"),
        ({"lora_alpha": 0}, {}, InvalidAdapter, "lora_alpha is 0"),
        ({"r": 64}, {}, InvalidAdapter, "do not belong together"),
        ({"trust_remote_code": True}, {}, UnsafeFile, "trust_remote_code"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, InvalidAdapter, "pissa"),
    ],
)
def test_what_cannot_be_adopted_says_why_and_nothing_is_uploaded(
    loopback_hub: LoopbackHub, made: Made, change: Any, options: Any, error: type[Exception], says: str
) -> None:
    place = LoopbackPlace(loopback_hub)
    put(place, configured(made.files, **change))
    with pytest.raises(error, match=says) as caught:
        take(PLAIN, place, **options)
    assert PLAIN in str(caught.value)
    assert "lora-plugins-" not in str(caught.value)  # no temporary folder
    with pytest.raises(RegistryError):
        versions(NAME, hub=place.hub)


def test_a_class_of_the_authors_own_is_left_out_of_the_configuration(place: Place, made: Made) -> None:
    put(place, configured(made.files, auto_mapping={"base_model_class": "Mine", "parent_library": "mine.models"}))
    with pytest.raises(UnsafeFile, match="transformers"):
        pull_adapter(f"{PLAIN}@main", hub=place.hub)
    assert take(PLAIN, place).changes == ("auto_mapping to a class of the author's own left out",)
    assert_loads(place, made)


def test_a_base_on_another_machine_is_named_when_adopted(place: Place, made: Made) -> None:
    put(place, configured(made.files, base_model_name_or_path="/root/models/llama"))
    assert pull_adapter(f"{PLAIN}@main", hub=place.hub).manifest.base.id is None
    assert take(PLAIN, place).published.manifest.base.id == "org/base"
    assert_loads(place, made)


def test_tensors_that_stay_behind_are_named(tmp_path: Path, made: Made) -> None:
    place = FolderPlace(tmp_path / "registry")
    folder = write(tmp_path / "adapter", {**made.files, "non_lora_state_dict.bin": b"x", "optimizer.pt": b"y"})
    with pytest.warns(UserWarning, match=r"holds non_lora_state_dict\.bin"):
        take(folder, place)


def test_the_command_lists_names_and_licences(tmp_path: Path, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_plugins.commands.cli import program

    folder = write(tmp_path / "adapter", renamed(made.files, lambda name: f"module.{name}"))
    arguments = ["adopt", str(folder), NAME, "--version", "1.0.0", "--hub", str(tmp_path / "r"), "--base-model", BASE]
    with pytest.raises(SystemExit):
        program([*arguments, "--dry-run"])
    told = capsys.readouterr().out
    assert "module.base_model.model.model.layers.0" in told
    assert "not stated\t8\twould be published" in told
    assert not (tmp_path / "r").exists()
    with pytest.raises(SystemExit):
        program([*arguments, "--json", "--license", "mit"])
    [found] = json.loads(capsys.readouterr().out)
    assert (found["license"], found["created"], len(found["renamed"])) == ("mit", True, 8)
    assert FolderHub(tmp_path / "r").refs(NAME).tags.keys() == {"v1.0.0"}
