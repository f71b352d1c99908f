"""What is collected for publishing, from each kind of source; what is refused before anything is uploaded."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, saved
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from twin import make_tokenizer

from lora_plugins import LoraCallback
from registry.errors import BaseMismatch, InvalidAdapter, RegistryError, TooLarge, UnknownBase, UnsafeFile
from registry.formats.manifest import Manifest
from registry.publishing.draft import make_release
from registry.publishing.source import collect

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def collected(source: Any, *, on_hub: bool = False, **options: Any) -> tuple[Manifest, dict[str, bytes]]:
    with collect(source, on_hub=on_hub, **options) as found:
        manifest, files = make_release(found, "org/name", "1.0.0", "0.9.0")
        content = {n: f if isinstance(f, bytes) else f.read_bytes() for n, f in files.items()}
    assert not found.folder.exists()
    return manifest, content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a base that was loaded from a folder, with everything beside it that doesn't belong there."""
    root = tmp_path_factory.mktemp("source")
    tiny.llama().save_pretrained(root / "base")
    base = tiny.LlamaForCausalLM.from_pretrained(root / "base")
    saved(base, root / "adapter")
    for name in (".env", "optimizer.pt", "training_args.bin", "rng_state.pth", "evil.py", "model.safetensors"):
        (root / "adapter" / name).write_bytes(b"secret")
    return root / "adapter"


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in (WEIGHTS, CONFIG):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def with_config(folder: Path, target: Path, **fields: Any) -> Path:
    copied = copy_of(folder, target)
    values = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**values, **fields}))
    return copied


def with_tensors(folder: Path, target: Path, change: Any) -> Path:
    copied = copy_of(folder, target)
    tensors = load_file(copied / WEIGHTS)
    (copied / WEIGHTS).unlink()
    save_file(change(tensors), copied / WEIGHTS)
    return copied


@pytest.mark.filterwarnings("error::registry.errors.AdapterWarning")
@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_1.pth"])
def test_state_for_resuming_under_fsdp_is_not_taken_for_something_trained(
    folder: Path, tmp_path: Path, name: str
) -> None:
    place = copy_of(folder, tmp_path / "checkpoint-6")
    (place / name).write_bytes(b"state")
    _, files = collected(place)
    assert name not in files


def test_only_what_belongs_to_the_adapter_is_published(folder: Path) -> None:
    manifest, files = collected(folder)
    assert set(files) == {WEIGHTS, CONFIG, "README.md"} == set(manifest.files)
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert b"secret" not in b"".join(files.values())
    assert manifest.parent_version == "0.9.0"
    assert {name: record.shape for name, record in manifest.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()
    }


def test_no_folder_of_this_machine_is_published(folder: Path) -> None:
    manifest, files = collected(folder)
    assert str(folder.parent).encode() not in b"".join(files.values()) + manifest.to_bytes()
    assert json.loads(files[CONFIG])["base_model_name_or_path"] is None
    assert manifest.base.id is None
    # By the files of the base, which no model was loaded from here.
    assert manifest.base.fingerprint is not None
    assert len(manifest.base.fingerprint.tensors) == 3


def test_folder_and_model_give_the_same_release(folder: Path) -> None:
    base = tiny.LlamaForCausalLM.from_pretrained(folder.parent / "base")
    model = PeftModel.from_pretrained(base, folder)
    from_model, _ = collected(model)
    from_folder, _ = collected(folder)
    assert from_model.content_digest == from_folder.content_digest
    assert from_model.base == from_folder.base
    assert from_model.config == from_folder.config == {
        "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip


def test_a_trainer_gives_facts_metrics_and_a_loss_curve(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    trainer = tiny.trainer(
        tmp_path, tiny.llama(), [LoraCallback(r=4, quantization="int8")], max_steps=3, save_strategy="steps",
        save_steps=3, eval_strategy="steps", eval_steps=3, trainer_arguments={"eval_dataset": tiny.rows(4)},
    )  # fmt: skip
    trainer.processing_class = tokenizer
    trainer.train()
    manifest, files = collected(trainer)
    assert manifest.training["steps"] == 3
    assert manifest.training["arguments"]["learning_rate"] == 0.01
    assert manifest.training["quantization"]["name"] == "int8"
    assert manifest.training["libraries"]["peft"]
    assert manifest.metrics["eval_loss"] > 0
    assert manifest.tokenizer_hash is not None
    assert files["loss.png"].startswith(b"\x89PNG")
    assert b"![Training loss by step](loss.png)" in files["README.md"]
    assert "tokenizer.json" not in files

    checkpoint, of_checkpoint = collected(tmp_path / "checkpoint-3", base_model="org/base")
    assert checkpoint.files[WEIGHTS] == manifest.files[WEIGHTS]
    assert checkpoint.training["steps"] == 3
    assert "loss.png" in of_checkpoint
    assert not any(name.endswith((".pt", ".bin", ".pth")) for name in of_checkpoint)


def test_the_tokenizer_is_published_with_a_changed_vocabulary(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(tiny.VOCABULARY + 3)
    trainer = tiny.trainer(tmp_path / "run", adapted(base))
    trainer.processing_class = make_tokenizer()
    manifest, files = collected(trainer)
    assert "tokenizer.json" in files
    assert manifest.architecture.vocab_size == tiny.VOCABULARY + 3
    assert any("embed_tokens" in name for name in manifest.tensors)


def test_the_hash_of_a_tokenizer_is_the_same_in_memory_and_in_a_file(tmp_path: Path) -> None:
    from registry.formats.tokenizers import hash_of_file, hash_of_tokenizer

    tokenizer = make_tokenizer()
    before = hash_of_tokenizer(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path)
    assert hash_of_tokenizer(tokenizer) == before == hash_of_file(tmp_path / "tokenizer.json")
    tokenizer.add_tokens(["<new>"])
    assert hash_of_tokenizer(tokenizer) != before


# -- the base ----------------------------------------------------------------------------------------------------


def test_a_local_base_is_refused_on_a_hub(folder: Path) -> None:
    with pytest.raises(UnknownBase, match=r"base model is the folder '.*base', which nobody else can load.*_model="):
        collected(folder, on_hub=True)


def test_a_local_base_gets_an_id(folder: Path) -> None:
    commit = "c" * 40
    manifest, files = collected(folder, on_hub=True, base_model=f"org/base@{commit}")
    assert (manifest.base.id, manifest.base.commit) == ("org/base", commit)
    assert manifest.base.fingerprint is not None
    config = json.loads(files[CONFIG])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert b"base_model: org/base\n" in files["README.md"]


@pytest.mark.parametrize("given", ["/srv/base", "../base", "https://example.com/x", "a/b/c", "", "org/..", "~"])
def test_a_base_model_that_is_no_id_is_refused(folder: Path, given: str) -> None:
    with pytest.raises(UnknownBase, match="not the id of a model"):
        collected(folder, base_model=given)


def test_a_base_that_cannot_be_identified_is_refused_everywhere(folder: Path, tmp_path: Path) -> None:
    unknown = with_config(folder, tmp_path / "a", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UnknownBase, match="cannot be identified from here"):
        collected(unknown)
    nameless = with_config(folder, tmp_path / "b", base_model_name_or_path=None)
    with pytest.raises(UnknownBase, match="a model without a name"):
        collected(nameless)


def test_a_folder_with_the_name_of_a_base_is_no_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadowed = with_config(folder, tmp_path / "a", base_model_name_or_path="org/base")
    assert collected(shadowed)[0].base.id == "org/base"
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownBase, match="the folder 'org/base'"):
        collected(shadowed, on_hub=True)


# -- adapters that are of no use ---------------------------------------------------------------------------------


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


@pytest.mark.parametrize("what", ["norm", "embedding", "bias"])
def test_a_tensor_that_is_trained_and_not_saved_is_refused(folder: Path, what: str) -> None:
    model: Any = PeftModel.from_pretrained(tiny.llama(), folder)
    model.set_adapter("default")
    base = model.base_model.model.model
    if what == "bias":
        layer = base.layers[0].mlp.up_proj
        layer.bias = torch.nn.Parameter(torch.zeros(64))
    else:
        (base.norm if what == "norm" else base.embed_tokens).weight.requires_grad_(True)
    with pytest.raises(InvalidAdapter, match=r"1 tensors of the model are trained.*modules_to_save"):
        collected(model, base_model="org/base")
    model.lora_plugins_unsaved_allowed = True
    collected(model, base_model="org/base")


def test_an_untrained_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InvalidAdapter, match="All 2 LoRA modules are zero"):
        collected(model)


SPOILT = {
    "no LoRA": (lambda t: {"base_model.model.x.weight": torch.ones(2)}, "is empty"),
    "all zero": (lambda t: {k: torch.zeros_like(v) for k, v in t.items()}, "All 4 LoRA modules are zero"),
    "NaN": (lambda t: {**t, first(t, "lora_B"): torch.full((32, 4), float("nan"))}, "NaN or infinite"),
    "no rows": (lambda t: {**t, first(t, "lora_A"): torch.zeros(4, 0)}, "or there are none"),
    "one dimension": (lambda t: {**t, first(t, "lora_A"): torch.ones(128)}, "not gathered"),
    "other rank in one half": (lambda t: {**t, first(t, "lora_A"): torch.ones(8, 32)}, "A of rank 8 and a B of rank 4"),
    "A without B": (lambda t: {k: v for k, v in t.items() if k != first(t, "lora_B")}, "a LoRA A and no B"),
    "B without A": (lambda t: {k: v for k, v in t.items() if k != first(t, "lora_A")}, "a LoRA B and no A"),
    "compiled": (lambda t: {k.replace("model.model", "model._orig_mod.model"): v for k, v in t.items()}, "_orig_mod"),
    "other prefix": (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "do not begin with"),
    "integers": (lambda t: {**t, first(t, "lora_A"): torch.ones(4, 32, dtype=torch.int8)}, "dtype I8"),
    "F64": (lambda t: {k: v.double() for k, v in t.items()}, "dtype F64"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_useless_adapter_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = SPOILT[case]
    with pytest.raises((InvalidAdapter, UnsafeFile), match=message):
        collected(with_tensors(folder, tmp_path / "a", change))


def test_a_rank_that_is_not_the_configured_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"has rank 4, and adapter_config\.json says 16"):
        collected(with_config(folder, tmp_path / "a", r=16))


def test_large_tensors_that_are_not_the_adapters_have_to_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.checks.tensors.LARGE", 10_000)
    model = adapted(tiny.llama(), modules_to_save=["lm_head"])
    with pytest.raises(TooLarge, match=r"lm_head\.weight \(0\.0 MB\).*allow=\['lm_head'\]"):
        collected(model, base_model="org/base")
    assert "base_model.model.lm_head.weight" in collected(model, base_model="org/base", allow=["lm_head"])[0].tensors
    with pytest.raises(TooLarge):
        collected(model, base_model="org/base", allow=["head"])


def test_things_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="A LlamaForCausalLM cannot be published"):
        collected(tiny.llama())
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        collected(tmp_path / "missing")
    with pytest.raises(InvalidAdapter, match=r"has no adapter_config\.json and no adapter_model\.safetensors"):
        collected(tmp_path)
    saved(tiny.llama(), tmp_path / "checkpoint-3")
    with pytest.raises(InvalidAdapter, match="It has adapters in checkpoint-3: name one of them"):
        collected(tmp_path)
    with pytest.raises(InvalidAdapter, match="The metric 'loss' is nan"):
        collected(adapted(tiny.llama()), metrics={"loss": float("nan")})


# -- files that are not what they should be ----------------------------------------------------------------------


def test_links_and_strange_files_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((folder / WEIGHTS).read_bytes())

    def replaced(name: str, make: Any) -> Path:
        copied = copy_of(folder, tmp_path / name)
        (copied / WEIGHTS).unlink()
        make(copied / WEIGHTS)
        return copied

    cases = {
        "symlink": (lambda path: path.symlink_to(secret), "is a symbolic link"),
        "hard link": (lambda path: os.link(secret, path), "2 names"),
        "FIFO": (os.mkfifo, "not a regular file"),
        "folder": (lambda path: path.mkdir(), "not a regular file|cannot be read"),
        "device": (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
    }
    for name, (make, message) in cases.items():
        with pytest.raises(UnsafeFile, match=message):
            collected(replaced(name, make))

    linked = copy_of(folder, tmp_path / "linked")
    (linked / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UnsafeFile, match=r"tokenizer\.json is a symbolic link"):
        collected(linked)


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    assert collected(tmp_path / "latest")[0].content_digest == collected(folder)[0].content_digest


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "a")
    (copied / WEIGHTS).rename(copied / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match=r"adapter_model\.bin is a pickle"):
        collected(copied)
    torch.save({"a": torch.ones(1)}, copied / WEIGHTS)
    with pytest.raises(UnsafeFile, match="not a safetensors file"):
        collected(copied)


EVIL: dict[str, dict[str, Any]] = {
    "other kind": {"peft_type": "IA3"},
    "unknown kind": {"peft_type": "os.system"},
    "negative rank": {"r": -1},
    "huge rank": {"r": 10**9},
    "rank is a text": {"r": "8"},
    "alpha is a text": {"lora_alpha": "8"},
    "library": {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    "library of the same beginning": {"auto_mapping": {"parent_library": "transformers_evil"}},
    "megatron": {"megatron_core": "evil"},
    "megatron config": {"megatron_config": {"a": 1}},
    "evil expression": {"target_modules": r"(a+)+b"},
    "evil alternatives": {"target_modules": r"(a|aa)*b"},
    "too many stars": {"target_modules": r".*.*.*.*.*.*x"},
    "evil rank pattern": {"rank_pattern": {r"(\w+)*x": 4}},
    "evil alpha pattern": {"alpha_pattern": {r"(\w+)*x": 4}},
    "evil exclusion": {"exclude_modules": r"(\w*)*x"},
    "evil layers": {"layers_pattern": [r"(\w*)*x"]},
    "broken expression": {"target_modules": "("},
    "modules to save": {"modules_to_save": [1]},
}


@pytest.mark.parametrize("case", EVIL)
def test_a_hostile_configuration_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    with pytest.raises(UnsafeFile, match=r"adapter_config\.json cannot be used: "):
        collected(with_config(folder, tmp_path / "a", **EVIL[case]))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 100_000, b'{"r": 1, "r": 2}', b'{"r": NaN}', b'{"a": "' + b"x" * 5_000_000 + b'"}']
)
def test_a_malformed_configuration_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    copied = copy_of(folder, tmp_path / "a")
    (copied / CONFIG).write_bytes(content)
    with pytest.raises(UnsafeFile, match=r"adapter_config\.json cannot be used: "):
        collected(copied)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"^(?!.*vision).*(?:self_attn|mlp).*(?:proj|fc\d?).*$",
        r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        "all-linear",
    ],
)
def test_expressions_that_people_use_are_taken(pattern: str) -> None:
    from registry.formats.patterns import is_cheap

    assert is_cheap(pattern)


def test_what_is_checked_is_what_is_published(folder: Path, tmp_path: Path) -> None:
    """A file that changes after it was checked is published as it was."""
    copied = copy_of(folder, tmp_path / "a")
    before = (copied / WEIGHTS).read_bytes()
    with collect(copied, on_hub=False, base_model="org/base") as found:
        (copied / WEIGHTS).write_bytes(b"something else")
        manifest, files = make_release(found, "org/name", "1.0.0")
        path = files[WEIGHTS]
        assert isinstance(path, Path)
        assert path.read_bytes() == before
        assert manifest.files[WEIGHTS].size == len(before)


def test_nothing_is_left_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    collected(folder)
    with pytest.raises(RegistryError):
        collected(folder, on_hub=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("other", [{"layers": 1}, {"num_key_value_heads": 4}, {"hidden_size": 64}])
@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_does_not_fit_the_base_it_names_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    """The base is at hand, and is not the one that the adapter was trained on: nobody could load the release."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "folder")
    assert collected(tmp_path / "folder")[0].base.fingerprint is not None
    tiny.llama(**other).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatch, match="does not fit"):
        collected(tmp_path / "folder")
