"""What version 0.1.0 has written can still be read: registry, lock file, cache, adapters, checkpoints.

The data is in ``data/version_0_1_0``; ``make_old_releases.py`` made it with that version, once. It is never changed: a
test that fails here says that users cannot read what they have. Only public names are used, so that the code may be
arranged in any way.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from versions import needs

from lora_plugins import LoraCallback, ParameterReportCallback, prepare_model
from lora_plugins.commands.cli import main
from registry import (
    FolderHub,
    Manifest,
    PushToRegistryCallback,
    aliases,
    list_adapters,
    pull_adapter,
    push_adapter,
    set_alias,
    show,
    unyank,
    verify,
    versions,
)

DATA = Path(__file__).parent / "data" / "version_0_1_0"
EXPECTED = json.loads((DATA / "expected.json").read_text())
RELEASES: dict[str, dict[str, str]] = EXPECTED["releases"]
#: What stands in the data for the address of the folder registry.
OLD_REGISTRY = "file:///old-registry"
WEIGHTS = "adapter_model.safetensors"
BASE = f"org/base@{'b' * 40}"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data, which is the working directory; reading a registry makes lock files in it."""
    folder = tmp_path / "old"
    # Without times: what has just been checked out is new, too.
    shutil.copytree(DATA, folder, copy_function=shutil.copyfile)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORA_REGISTRY", FolderHub(folder / "registry").location)
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "new-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "adapters.lock").rename(folder / "old.lock")  # where nobody uses it unasked
    return folder


def base() -> Any:
    """The base model."""
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    """What a model says, the last three places of it."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(EXPECTED["prompt"])).logits[:, -3:]


def assert_says(model: Any, key: str, tolerance: float = 1e-4) -> None:
    """The model computes what it did in the old version."""
    expected = load_file("expected.safetensors")[key]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=tolerance, rtol=tolerance)


def command(*arguments: str) -> str:
    """What ``lora-plugins`` prints, run in this process: starting another takes longer than the command."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["lora-plugins", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, output.getvalue()
    return output.getvalue()


def spoil(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def as_if_here(old: Path) -> None:
    """Let lock file and cache say that they are of the registry that is in the copy."""
    location = FolderHub(old / "registry").location
    lock = old / "old.lock"
    lock.write_text(lock.read_text().replace(OLD_REGISTRY, location))
    before, now = (hashlib.sha256(address.encode()).hexdigest()[:16] for address in (OLD_REGISTRY, location))
    (old / "cache" / "seen" / before).rename(old / "cache" / "seen" / now)


def trainer(folder: str, *callbacks: Any, **arguments: Any) -> Trainer:
    """The Trainer with which the old version has trained."""
    rows = json.loads(Path("rows.json").read_text())
    given: dict[str, Any] = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 7,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **arguments,
    }  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return Trainer(model=base(), args=TrainingArguments(**given), train_dataset=data, callbacks=list(callbacks))


# -- the registry ------------------------------------------------------------------------------------------------------


def test_versions_withdrawals_and_aliases_are_listed(old: Path) -> None:
    """All of the registry's own files are understood."""
    found = versions("org/summaries")
    assert [release.version for release in found] == ["1.0.0", "1.1.0", "1.2.0", "2.0.0rc1"]
    assert [release.yanked for release in found] == [None, None, "trained on the test set", None]
    assert found[1].aliases == ("champion",)
    history = {alias: [move.version for move in moves] for alias, moves in aliases("org/summaries").items()}
    assert history == {"champion": ["1.0.0", "1.1.0"], "candidate": ["2.0.0rc1", None]}
    newest = {described.name: described.version for described in list_adapters()}
    assert newest == {"org/counting": "0.2.0", "org/dora": "1.0.0", "org/summaries": "1.1.0"}
    printed = json.loads(command("versions", "org/summaries", "--json"))
    assert [release["version"] for release in printed] == [release.version for release in found]


@pytest.mark.parametrize(
    ("behind", "version"),
    [
        ("", "1.1.0"),
        ("@1.0", "1.0.0"),
        ("@2.0.0rc1", "2.0.0rc1"),
        (">=1,<2", "1.1.0"),
        ("==1.0.*", "1.0.0"),
        (">=2.0rc1", "2.0.0rc1"),
        ("@champion", "1.1.0"),
        (f"@{RELEASES['org/summaries@1.0.0']['commit']}", "1.0.0"),
    ],
)
def test_every_kind_of_reference_finds_its_release(old: Path, behind: str, version: str) -> None:
    """By version, range, alias and commit: the release with the bytes that were pushed."""
    expected = RELEASES[f"org/summaries@{version}"]
    described, adapter = show(f"org/summaries{behind}"), pull_adapter(f"org/summaries{behind}")
    assert (described.version, adapter.version) == (version, version)
    assert described.manifest.digest == adapter.manifest.digest == expected["digest"]
    assert described.release.commit == adapter.commit == expected["commit"]


def test_a_withdrawn_version_warns_and_is_chosen_by_no_range(old: Path) -> None:
    """The newest one was withdrawn: who names it gets it, with the reason."""
    with pytest.warns(UserWarning, match=r"org/summaries@1\.2\.0 was withdrawn: trained on the test set"):
        assert pull_adapter("org/summaries@1.2.0").version == "1.2.0"
    assert pull_adapter("org/summaries~=1.0").version == "1.1.0"
    assert unyank("org/summaries@1.2.0").yanked is None
    assert pull_adapter("org/summaries~=1.0").version == "1.2.0"


def test_manifests_and_cards_are_as_they_were(old: Path) -> None:
    """Every manifest is valid by today's schema and keeps its digest; the Hub finds the card."""
    from jsonschema import validate

    schema = json.loads(importlib.resources.files("registry").joinpath("adapter_manifest.schema.json").read_text())
    found = sorted((old / "registry").rglob("adapter_manifest.json"))
    assert len(found) == len(RELEASES)
    for path in found:
        validate(json.loads(path.read_text()), schema)
        assert Manifest.parse(path.read_bytes()).digest == path.parent.name
        card = ModelCard((path.parent / "README.md").read_text())
        assert {"lora-plugins", "peft"} <= set(card.data.tags)

    metrics = show("org/summaries@1.1.0").manifest.metrics
    assert metrics == {"rouge": 0.41, "loss": 1.5}
    first, second = (show(f"org/counting@0.{minor}.0").manifest for minor in (1, 2))
    assert (first.parent_version, second.parent_version) == (None, "0.1.0")
    assert (first.training["steps"], second.training["steps"]) == (4, 2)
    assert (first.training["quantization"], "quantization" in second.training) == ("bitsandbytes 8-bit", False)
    assert first.metrics.keys() == {"eval_loss"}
    assert first.tokenizer_hash is not None
    told = show("org/summaries").manifest.base
    assert f"{told.id}@{told.commit}" == BASE


def test_every_release_is_verified_and_a_damaged_one_is_noticed(old: Path) -> None:
    """Byte by byte, in Python and by the command, and the check is no formality."""
    for reference in RELEASES:
        assert verify(reference).problems == (), reference
    assert json.loads(command("verify", "org/dora", "--json"))["ok"] is True
    for reference, release in RELEASES.items():
        name = reference.partition("@")[0]
        spoil(old / "registry" / name / "commits" / release["commit"] / WEIGHTS)
        [problem] = verify(reference).problems
        assert problem.startswith(f"{WEIGHTS} has the sha256 ")
    with pytest.raises(Exception, match=f"{WEIGHTS} has the sha256 "):
        pull_adapter("org/dora")


@pytest.mark.parametrize("reference", RELEASES)
@pytest.mark.filterwarnings("ignore:org/summaries@1.2.0 was withdrawn")
def test_a_release_computes_what_it_did(old: Path, reference: str) -> None:
    """Its base is recognized, another one is refused, and the logits are those of the old version."""
    adapter = pull_adapter(reference)
    if reference != "org/tokens@0.1.0rc1":  # that one has more tokens than its base, which `load` adds
        assert adapter.check(Path("base")).identity == "verified"
        other = base()
        with torch.no_grad():
            other.get_input_embeddings().weight += 0.1
        with pytest.raises(ValueError, match="same shapes and other weights"):
            adapter.load(other)
    else:
        assert len(AutoTokenizer.from_pretrained(adapter.path)) == adapter.manifest.architecture.vocab_size == 322
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be verified")
        assert_says(adapter.load(Path("base"), dtype=torch.float32), reference)


def test_publishing_goes_on(old: Path) -> None:
    """What is there is recognized as the same, and new versions, aliases and runs follow on the old ones."""
    champion = pull_adapter("org/summaries@champion")
    again = push_adapter(champion.load(base()), "org/summaries", version="1.1.0", base_model=BASE)
    assert (again.created, again.manifest.digest) == (False, champion.manifest.digest)
    dora = push_adapter(pull_adapter("org/dora").load(base()), "org/dora", version="1.0.0")
    assert dora.created is False

    first = pull_adapter("org/summaries@1.0.0")
    with pytest.raises(Exception, match=r"1\.1\.0"):
        push_adapter(first.load(base()), "org/summaries", version="1.1.0", base_model=BASE)
    made = push_adapter(first.load(base()), "org/summaries", version="minor", base_model=BASE)
    assert (made.version, made.manifest.parent_version) == ("1.3.0", "1.2.0")
    set_alias("org/summaries@1.3.0", "champion", expect="1.1.0")
    assert pull_adapter("org/summaries@champion").version == "1.3.0"

    push = PushToRegistryCallback("org/counting", version="minor")
    trainer("new", LoraCallback(adapter="org/counting@0.2.0"), push, max_steps=1).train()
    assert [release.version for release in versions("org/counting")] == ["0.1.0", "0.2.0", "0.3.0"]


# -- lock file and cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
def test_the_lock_file_is_honoured(old: Path, here: bool) -> None:
    """It fixes a version that isn't the newest, in the registry that it names and in a copy of it."""
    if here:
        as_if_here(old)
    (old / "old.lock").rename("adapters.lock")
    content = Path("adapters.lock").read_bytes()
    assert pull_adapter("org/summaries").version == "1.0.0"
    assert pull_adapter("org/dora", frozen=True).version == "1.0.0"
    with pytest.raises(Exception, match=r"at 1\.0\.0, which is not org/summaries@1\.1\.0"):
        pull_adapter("org/summaries@1.1.0")
    with pytest.raises(LookupError, match="org/counting is not in"):
        pull_adapter("org/counting", frozen=True)
    assert json.loads(command("pull", "org/summaries", "--frozen", "--json"))["version"] == "1.0.0"
    pull_adapter("org/summaries", lock=True)
    assert Path("adapters.lock").read_bytes() == content or not here
    digest = RELEASES["org/summaries@1.0.0"]["digest"]
    Path("adapters.lock").write_bytes(content.replace(f'"manifest": "{digest}'.encode(), b'"manifest": "' + b"0" * 64))
    with pytest.raises(Exception, match=f"had {'0' * 64} before"):
        pull_adapter("org/summaries", cache_dir="empty")


def test_a_warm_cache_is_enough(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pulled from a hub is found without it, by version, range, alias and commit."""
    shutil.rmtree("registry")
    hub = EXPECTED["remote"]["hub"]
    for behind, version in [
        ("", "1.1.0"),
        ("@champion", "1.1.0"),
        (">=2.0rc1", "2.0.0rc1"),
        (f"@{EXPECTED['remote']['2.0.0rc1']}", "2.0.0rc1"),
    ]:
        adapter = pull_adapter(f"org/summaries{behind}", hub=hub, cache_dir="cache", offline=True)
        assert adapter.version == version
        assert adapter.commit == EXPECTED["remote"][version]
        assert Path(adapter.path).is_relative_to(old / "cache")
        assert_says(adapter.load(base()), f"org/summaries@{version}")
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(old / "cache"))
    printed = json.loads(command("pull", "org/summaries", "--hub", hub, "--offline", "--json"))
    assert printed["digest"] == RELEASES["org/summaries@1.1.0"]["digest"]
    spoil(Path(adapter.path, WEIGHTS))
    with pytest.raises(Exception, match=f"{WEIGHTS} has the sha256 "):
        pull_adapter("org/summaries@2.0.0rc1", hub=hub, cache_dir="cache", offline=True)


def test_what_the_cache_has_seen_is_remembered(old: Path) -> None:
    """A cached release isn't read from the registry again, and a tag that has moved since is noticed."""
    as_if_here(old)
    for release in RELEASES.values():
        for path in (old / "registry").glob(f"*/*/commits/{release['commit']}"):
            shutil.rmtree(path)
    assert_says(pull_adapter("org/dora", cache_dir="cache").load(base()), "org/dora@1.0.0")
    assert pull_adapter("org/summaries@1.0.0", cache_dir="cache").version == "1.0.0"
    refs = old / "registry" / "org" / "summaries" / "refs.json"
    content = json.loads(refs.read_text())
    release = content["tags"]["v1.0.0"]
    content["tags"]["v1.0.0"] = content["tags"]["v1.1.0"]
    refs.write_text(json.dumps(content))
    with pytest.raises(Exception, match=f"was commit {release} and is commit"):
        pull_adapter("org/summaries@1.0.0", cache_dir="cache")


# -- adapters and checkpoints ------------------------------------------------------------------------------------------


def test_a_saved_adapter_is_loaded_and_published(old: Path) -> None:
    """A folder of ``trainer.save_model``, and one of the train command."""
    for folder in ("adapter", "command-adapter"):
        assert_says(prepare_model(base(), adapter=Path(folder)), folder)
        published = push_adapter(Path(folder), f"new/{folder}", version="1.0.0", base_model=BASE)
        assert_says(pull_adapter(str(published)).load(base(), trust_identity=True), folder)


@needs("numpy", "2.0", "it cannot read states that numpy 2 has written")
def test_a_checkpoint_is_continued(old: Path) -> None:
    """The run ends where it has ended in the old version, which means that the optimizer goes on, too."""
    report = json.loads(Path("run/parameter_report.json").read_text())
    callbacks = [LoraCallback(r=4, lora_dropout=0.0), ParameterReportCallback()]
    run = trainer("run", *callbacks, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint="run/checkpoint-2")
    assert [entry["step"] for entry in run.state.log_history] == [1, 2, 3, 4, 4]
    run.save_model("new")
    found, expected = load_file(f"new/{WEIGHTS}"), load_file(f"adapter/{WEIGHTS}")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    before = load_file(f"run/checkpoint-2/{WEIGHTS}")
    assert any((before[name] - tensor).abs().max() > 1e-3 for name, tensor in found.items())
    new = json.loads(Path("run/parameter_report.json").read_text())
    # A later version may have more to note; every figure stays.
    assert {**report, "notes": []} == {**{name: new[name] for name in report}, "notes": []}


@needs("torch", "2.13", "the weights that it ends with were recorded with this release")
def test_a_run_of_the_train_command_is_resumed(old: Path) -> None:
    """From its checkpoint and ``run.json``; it ends with the adapter that the whole run had."""
    train = [sys.executable, "-m", "lora_plugins", "train", "--config", "run.yaml", "--resume"]
    done = subprocess.run(train, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint-2" in done.stdout
    found, expected = load_file(f"command/adapter/{WEIGHTS}"), load_file(f"command-adapter/{WEIGHTS}")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    recipes = [json.loads(Path(folder, "recipe.json").read_text()) for folder in ("command-adapter", "command/adapter")]
    assert recipes[0].items() <= recipes[1].items()


@pytest.mark.parametrize(("adapter", "more"), [("org/counting@0.1.0", []), ("./command-adapter", [])])
def test_an_adapter_is_merged(old: Path, adapter: str, more: list[str]) -> None:
    """By the command: a release, and a folder whose ``recipe.json`` says how its base was quantized.

    The manifest of the release says it as "bitsandbytes 8-bit", which is taken for int8.
    """
    command("merge", adapter, "merged", "--base", "base", "--dtype", "same", "--no-probe")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert_says(model, f"merged {adapter.removeprefix('./')}", 1e-3)
