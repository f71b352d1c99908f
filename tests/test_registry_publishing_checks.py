"""What is recorded was seen, what a push would refuse is refused before the training, what is left behind is named."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, saved
from twin import make_tokenizer

from lora_plugins import prepare_model
from registry import check_push, push_adapter
from registry.errors import (
    AdapterWarning,
    BaseMismatch,
    IdentityWarning,
    InvalidAdapter,
    TooLarge,
    UnknownBase,
    UnsafeFile,
)
from registry.formats.manifest import Manifest
from registry.publishing.source import collect

NAME = "org/name"
BASE = f"org/base@{'b' * 40}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a base in a folder."""
    root = tmp_path_factory.mktemp("checks")
    tiny.llama().save_pretrained(root / "base")
    return saved(tiny.LlamaForCausalLM.from_pretrained(root / "base"), root / "adapter")


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**values, **fields}))
    return target


def pushed(source: Any, tmp_path: Path, **options: Any) -> Manifest:
    return push_adapter(source, NAME, version="1.0.0", hub=tmp_path / "registry", **options).manifest


# -- files beside the adapter (A-14) -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_state_dict.bin",
        "value_head.safetensors",
        "value_head.bin",
        "new_embeddings.safetensors",
        "v_head.pt",
        "mm_projector.bin",
        "model.safetensors",
        "heads.npz",
    ],
)
def test_trained_files_that_stay_behind_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    source = changed(folder, tmp_path / "adapter")
    (source / name).write_bytes(b"x")
    with pytest.warns(AdapterWarning, match=rf"holds {name.replace('.', '[.]')}, which a release does not"):
        pushed(source, tmp_path)


def test_what_a_trainer_leaves_to_go_on_is_not_named(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, tmp_path / "adapter")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt", "notes.txt"):
        (source / name).write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        pushed(source, tmp_path)


# -- configurations of no use, and code (A-12, F12) ----------------------------------------------------------------


def test_an_alpha_of_zero_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="lora_alpha is 0"):
        pushed(changed(folder, tmp_path / "adapter", lora_alpha=0), tmp_path)
    with pytest.raises(InvalidAdapter, match="lora_alpha is 0"):
        check_push(adapted(tiny.llama(), lora_alpha=0), NAME, version="1.0.0", hub=tmp_path, base_model=BASE)


#: Configurations that PEFT loads on no base, or that their own tensors contradict.
UNSOUND: dict[str, dict[str, Any]] = {
    "a field of PEFT 0.2": {"enable_lora": [True, False, True]},
    "a newer field": {"peft_version": "99.0", "use_magic": True},
    "no such initialization": {"init_lora_weights": "magic"},
    "an initialization that is lost": {"init_lora_weights": "corda"},
    "a regex with layers": {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    "a pattern without layers": {"layers_pattern": ["layers"]},
    "other targets": {"target_modules": ["k_proj", "o_proj"]},
    "fewer targets": {"target_modules": ["q_proj"]},
    "a regex for others": {"target_modules": r".*\\.mlp\\..*"},
    "excluded": {"exclude_modules": ["q_proj"]},
    "excluded by a regex": {"exclude_modules": r".*v_proj"},
    "fewer layers": {"layers_to_transform": [0]},
    "other layers": {"layers_to_transform": 7, "layers_pattern": "layers"},
    "DoRA without magnitudes": {"use_dora": True},
    "a module that is not saved": {"modules_to_save": ["lm_head"]},
    "tokens that are not saved": {"trainable_token_indices": [1, 2]},
    "another rank": {"r": 16},
}


@pytest.mark.parametrize("case", UNSOUND)
def test_what_no_base_could_take_is_refused_though_the_base_is_not_at_hand(
    folder: Path, tmp_path: Path, case: str
) -> None:
    source = changed(folder, tmp_path / "adapter", base_model_name_or_path="org/elsewhere", **UNSOUND[case])
    with pytest.raises((BaseMismatch, InvalidAdapter)):
        pushed(source, tmp_path, base_model=BASE)
    assert not (tmp_path / "registry").exists()


def test_magnitudes_without_dora_are_refused(tmp_path: Path) -> None:
    source = saved(tiny.llama(), tmp_path / "dora", use_dora=True)
    assert pushed(source, tmp_path / "sound", base_model=BASE)
    with pytest.raises(InvalidAdapter, match="use_dora is false"):
        pushed(changed(source, tmp_path / "adapter", use_dora=False), tmp_path, base_model=BASE)


@pytest.mark.parametrize("switch", [{"auto_map": {"AutoTokenizer": ["x.T", None]}}, {"trust_remote_code": True}])
def test_a_tokenizer_that_runs_code_is_refused(tmp_path: Path, switch: dict[str, Any]) -> None:
    base = tiny.llama()
    tokenizer = make_tokenizer()
    source = saved(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    tokenizer.save_pretrained(source)
    file = source / "tokenizer_config.json"
    assert "tokenizer_config.json" in pushed(source, tmp_path / "plain", base_model=BASE).files
    file.write_text(json.dumps({**json.loads(file.read_text()), **switch}))
    with pytest.raises(UnsafeFile, match=f"tokenizer_config.json sets {next(iter(switch))}"):
        pushed(source, tmp_path, base_model=BASE)


def test_configuration_and_manifest_name_one_base(folder: Path, tmp_path: Path) -> None:
    with collect(folder, on_hub=True, base_model=BASE) as found:
        written = json.loads((found.folder / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", "b" * 40)
    assert (found.base.id, found.base.commit) == ("org/base", "b" * 40)


# -- before the training (A-13) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "error"),
    [
        ({"target_modules": r"(z*)*.*q_proj"}, UnsafeFile),
        ({"target_modules": ".*q_proj", "exclude_modules": r"(z*)*#"}, UnsafeFile),
        ({"rank_pattern": {r"(z*)*q_proj": 4}}, UnsafeFile),
        ({"lora_alpha": 0}, InvalidAdapter),
    ],
)
def test_what_push_refuses_is_refused_before_the_training(
    tmp_path: Path, lora: dict[str, Any], error: type[Exception]
) -> None:
    model = adapted(tiny.llama(), **lora)
    with pytest.raises(error):
        check_push(model, NAME, version="1.0.0", hub=tmp_path / "registry", base_model=BASE)
    with pytest.raises(error):
        pushed(model, tmp_path, base_model=BASE)


def test_large_heads_are_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.checks.tensors.LARGE", 1000)
    model = adapted(tiny.llama(), modules_to_save=["lm_head"])
    with pytest.raises(TooLarge, match="lm_head"):
        check_push(model, NAME, version="1.0.0", hub=tmp_path, base_model=BASE)
    check_push(model, NAME, version="1.0.0", hub=tmp_path, base_model=BASE, allow=["lm_head"])


# -- the base (A-3, A-12) ------------------------------------------------------------------------------------------


def cache_of(home: Path, commits: dict[str, Path], refs: dict[str, str]) -> None:
    """A Hub cache that holds commits of a base."""
    model = home / "hub" / "models--org--base"
    for commit, files in commits.items():
        shutil.copytree(files, model / "snapshots" / commit)
    (model / "refs").mkdir(parents=True)
    for ref, commit in refs.items():
        (model / "refs" / ref).write_text(commit)


def test_a_folder_push_records_of_the_base_only_what_is_pinned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = "1" * 40, "2" * 40
    tiny.llama(seed=5).save_pretrained(tmp_path / "other")
    cache_of(tmp_path / "home", {one: folder.parent / "base", two: tmp_path / "other"}, {"main": two, "dev": one})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))

    def base_for(revision: str | None) -> Any:
        source = changed(folder, tmp_path / str(revision), base_model_name_or_path="org/base", revision=revision)
        return pushed(source, tmp_path / f"to-{revision}").base

    # What main holds now need not be what it was trained on.
    unpinned = base_for(None)
    assert (unpinned.id, unpinned.commit, unpinned.fingerprint) == ("org/base", None, None)
    pinned = base_for(one)
    assert (pinned.id, pinned.commit) == ("org/base", one)
    assert pinned.fingerprint is not None
    for name in ("dev", "gone"):
        with pytest.raises(UnknownBase, match=f"'{name}' of org/base is a branch or a tag"):
            base_for(name)


@pytest.mark.parametrize("cached", [{"main": "2" * 40}, {"main": "2" * 40, "dev": "1" * 40}, {"dev": "1" * 40}])
def test_a_live_model_is_recorded_with_the_commit_that_has_its_tensors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: dict[str, str]
) -> None:
    """Whatever branch it was loaded from: transformers doesn't say."""
    tiny.llama(seed=5).save_pretrained(tmp_path / "other")
    commits = {"1" * 40: folder.parent / "base", "2" * 40: tmp_path / "other"}
    cache_of(tmp_path / "home", {key: commits[key] for key in cached.values()}, cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    base = tiny.LlamaForCausalLM.from_pretrained(folder.parent / "base")
    base.config._name_or_path = base.name_or_path = "org/base"
    recorded = pushed(adapted(base), tmp_path).base
    assert (recorded.id, recorded.commit) == ("org/base", "1" * 40 if "1" * 40 in cached.values() else None)


@pytest.mark.parametrize("name", ["models/k2", "model"])
def test_a_relative_folder_is_not_taken_for_an_id(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder.parent / "base", tmp_path / name)
    source = changed(folder, tmp_path / "runs" / "one" / "adapter", base_model_name_or_path=name)
    base = pushed(source, tmp_path).base
    assert base.id is None
    assert base.fingerprint is not None
    with pytest.raises(UnknownBase, match="is the folder"), collect(source, on_hub=True):
        pass


def test_a_base_that_nobody_has_seen_is_told(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, tmp_path / "adapter", base_model_name_or_path="models/k2")
    with pytest.warns(IdentityWarning, match="neither a folder here nor a model in the local cache"):
        assert pushed(source, tmp_path).base.id == "models/k2"


def test_an_adapter_that_does_not_fit_its_own_model_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny.llama())
    # Somebody resized the layers under the adapter after it was made.
    other = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer = other
    with pytest.raises(BaseMismatch):
        pushed(model, tmp_path, base_model=BASE)


# -- how the base was stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "recorded"), [("int8", "int8"), (None, "none"), ({"name": "nf4", "double_quant": False}, "nf4")]
)
def test_the_quantization_is_what_the_prepared_model_says(tmp_path: Path, quantization: Any, recorded: str) -> None:
    model = prepare_model(tiny.llama(), r=4, quantization=quantization)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = pushed(model, tmp_path, base_model=BASE).training["quantization"]
    assert (found if isinstance(found, str) else found["name"]) == recorded
    if recorded == "nf4":
        assert found["double_quant"] is False


def test_what_others_prepared_is_recorded_as_not_known(tmp_path: Path) -> None:
    assert pushed(adapted(tiny.llama()), tmp_path, base_model=BASE).training["quantization"] == "not known"
    model = adapted(tiny.llama())
    model.get_base_model().lora_plugins_facts = {"quantization": {"name": "awq", "options": {}}, "known": False}
    assert pushed(model, tmp_path / "two", base_model=BASE).training["quantization"] == "not known"
