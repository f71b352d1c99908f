"""`doctor`: damaged adapters are named by their damage, sound ones are left in peace, cured ones load."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hubs import EVERY_KIND, LoopbackPlace, Place, make_place
from peft import LoraConfig, PeftModel, get_peft_model
from plain import put, put_request
from safetensors.torch import load_file, save_file
from torch import nn

from registry import Check, Finding, InvalidAdapter, diagnose, push_adapter
from registry.checks.peft_fields import read_known_fields
from registry.errors import InvalidReference, NotAdapter, UnknownBase, VersionNotFound
from registry.health.doctor import Diagnosis
from registry.testing import LoopbackHub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Tensors = dict[str, torch.Tensor]
IDS = torch.arange(1, 9)[None]


def adapt(base: Any, **fields: Any) -> PeftModel:
    """Put a LoRA into a model, with values as after a training."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "revision": COMMIT, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    return model


def save(model: PeftModel, folder: Path, **options: Any) -> Path:
    """Save an adapter as PEFT does, for a base that is on a hub."""
    model.peft_config["default"].base_model_name_or_path = "org/base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=options.pop("save_embedding_layers", False), **options)
    return folder


def names(found: Diagnosis) -> set[str]:
    return {symptom.check for symptom in found.symptoms}


# -- sound adapters ------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """An image model in which LoRA goes into a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.conv(pixels).mean((2, 3)))
        return hidden


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, **fields))


def plain() -> PeftModel:
    return adapt(tiny.llama(), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trl(folder: Path) -> None:
    """Add what TRL's and the Trainer's saving leave beside an adapter."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
        (folder / name).write_bytes(pickle.dumps({}))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def unsloth(folder: Path) -> None:
    """Write the fields that Unsloth and older releases of PEFT write, without those of this one."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}
    fields["auto_mapping"] |= {"unsloth_fixed": True}
    fields = {key: value for key, value in fields.items() if key not in ("target_parameters", "arrow_config")}
    path.write_text(json.dumps({**fields, "peft_version": "0.14.0"}))


Q = {"target_modules": ["q_proj", "v_proj"]}
SOUND: dict[str, Callable[[], PeftModel]] = {
    "plain": plain,
    "rslora": lambda: adapt(tiny.llama(), use_rslora=True, **Q),
    "dora": lambda: adapt(tiny.llama(), use_dora=True, **Q),
    "bias": lambda: adapt(tiny.bloom(), bias="all", target_modules=["query_key_value"]),
    "lora bias": lambda: adapt(tiny.bloom(), lora_bias=True, target_modules=["query_key_value"]),
    "modules to save": lambda: adapt(tiny.llama(), modules_to_save=["lm_head"], **Q),
    "trainable tokens": lambda: adapt(tiny.llama(), trainable_token_indices=[1, 2], **Q),
    "rank pattern": lambda: adapt(tiny.llama(), rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 32}, **Q),
    "layers": lambda: adapt(tiny.llama(), layers_to_transform=[1], **Q),
    "a regex": lambda: adapt(tiny.llama(), target_modules=r".*\.(q|v)_proj"),
    "target parameters": lambda: adapt(
        mixtral(), target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    ),
    "embeddings": lambda: adapt(tiny.llama(), target_modules=["embed_tokens", "q_proj"]),
    "conv": lambda: adapt(Convolution(), target_modules=["conv"]),
    "conv1d": lambda: adapt(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
    "classifier": lambda: adapt(tiny.bert_classifier(), target_modules=["query"], task_type="SEQ_CLS"),
    "bfloat16": lambda: adapt(tiny.llama().bfloat16(), **Q),
    "gaussian": lambda: adapt(tiny.llama(), init_lora_weights="gaussian", **Q),
}
STYLES: dict[str, Callable[[Path], None]] = {"trl": trl, "unsloth": unsloth}


@pytest.mark.parametrize("kind", [*SOUND, *STYLES])
def test_nothing_is_found_in_a_sound_adapter(kind: str, tmp_path: Path) -> None:
    save(SOUND.get(kind, plain)(), tmp_path)
    if kind in STYLES:
        STYLES[kind](tmp_path)
    found = diagnose(tmp_path)
    assert (found.symptoms, found.not_read, found.exit_code) == ((), {}, 0)


def test_a_revision_that_is_not_recorded_is_a_note_and_no_more(tmp_path: Path) -> None:
    model = adapt(tiny.llama(), revision=None, **Q)
    [symptom] = diagnose(save(model, tmp_path)).symptoms
    assert (symptom.check, symptom.severity) == ("no-revision", "note")
    assert diagnose(tmp_path).exit_code == 0


def test_embeddings_of_a_grown_vocabulary_are_no_accident(tmp_path: Path) -> None:
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100)
    save(adapt(base, **Q), tmp_path / "adapter", save_embedding_layers=True)
    assert names(diagnose(tmp_path / "adapter")) == {"whole-embeddings"}
    assert names(diagnose(tmp_path / "adapter", base=tmp_path / "base")) == set()


# -- damaged adapters ----------------------------------------------------------------------------------------------


class Damaged:
    """The files of an adapter, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "adapter_model.safetensors"

    def tensors(self, change: Callable[[Tensors], Tensors]) -> None:
        save_file({k: v.contiguous() for k, v in change(load_file(self.path)).items()}, self.path)

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors(lambda tensors: {change(name): tensor for name, tensor in tensors.items()})

    def values(self, change: Callable[[torch.Tensor], torch.Tensor], part: str, most: int = 99) -> None:
        def apply(tensors: Tensors) -> Tensors:
            chosen = [name for name in sorted(tensors) if part in name][:most]
            return {name: change(tensor) if name in chosen else tensor for name, tensor in tensors.items()}

        self.tensors(apply)

    def fields(self, **fields: Any) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def without(self, part: str) -> None:
        self.tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})

    def with_(self, **tensors: torch.Tensor) -> None:
        self.tensors(lambda old: {**old, **{name.replace("__", "."): value for name, value in tensors.items()}})


P = "base_model.model."
FIRST = f"{P}model.layers.0.self_attn.q_proj"
#: Damage, what it is called, what the message or the cure names.
DAMAGE: dict[str, tuple[Callable[[Damaged], object], str, str]] = {
    "all of B is zero": (lambda d: d.values(torch.zeros_like, "lora_B"), "untrained", "changes nothing"),
    "one B is zero": (lambda d: d.values(torch.zeros_like, "lora_B", 1), "zero-modules", "1 of 4"),
    "NaN": (lambda d: d.values(lambda t: t * float("nan"), "lora_A", 1), "not-finite", FIRST),
    "infinity": (lambda d: d.values(lambda t: t / 0.0, "lora_B", 1), "not-finite", FIRST),
    "size 0": (lambda d: d.values(lambda t: t[:0], "lora_A", 1), "empty-tensors", FIRST),
    "no rows left of a pair": (lambda d: d.values(lambda t: t.flatten(), "q_proj"), "shape", FIRST),
    "half a pair": (lambda d: d.without("layers.0.self_attn.q_proj.lora_B"), "half-module", "LoRA A and no B"),
    "A and B of other ranks": (lambda d: d.values(lambda t: t[:2], "lora_A", 1), "uneven-rank", "rank 2"),
    "another configuration's rank": (lambda d: d.fields(r=16, lora_alpha=32), "other-rank", "says 16"),
    "integers": (lambda d: d.values(lambda t: t.to(torch.int8), "lora_A", 1), "dtype", "I8"),
    "float64": (lambda d: d.values(torch.Tensor.double, "lora_"), "double-precision", "F64"),
    "compiled": (lambda d: d.rename(lambda n: n.replace("model.layers", "_orig_mod.model.layers")),
                 "compiled-names", "Leave _orig_mod. out"),
    "DDP": (lambda d: d.rename(lambda n: f"module.{n}"), "foreign-prefix",
            "Leave 'module.' out"),
    "bare names": (lambda d: d.rename(lambda n: n.removeprefix(P)), "foreign-prefix", f"Put {P!r} before"),
    "wrapped twice": (lambda d: d.rename(lambda n: P + n), "doubled-prefix", f"Rename {2 * P!r} to {P!r}"),
    "DDP inside": (lambda d: d.rename(lambda n: n.replace(P, f"{P}module.")), "inner-wrapper", "module."),
    "FSDP": (lambda d: d.rename(lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn")),
             "wrapper-names", "_fsdp_wrapped_module."),
    "a state dict": (lambda d: d.rename(lambda n: n.replace(".weight", ".default.weight")),
                     "adapter-name", ".lora_A.weight"),
    "loralib": (lambda d: d.rename(lambda n: n.removesuffix(".weight")), "older-layout", "lora_A.weight"),
    "kohya": (lambda d: d.rename(lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up")),
              "older-layout", "lora_down"),
    "base weights": (lambda d: d.with_(**{f"{P}model.norm.weight": torch.full((32,), 2.0)}), "base-weights", "norm"),
    "a base layer": (lambda d: d.with_(**{f"{FIRST}.base_layer.weight": torch.ones(32, 32)}), "base-weights", FIRST),
    "embeddings": (lambda d: d.with_(**{f"{P}model.embed_tokens.weight": tiny.llama().model.embed_tokens.weight}),
                   "whole-embeddings", "embed_tokens"),
    "no LoRA": (lambda d: d.tensors(lambda _: {f"{P}lm_head.weight": torch.ones(96, 32)}), "no-lora", "is empty"),
    "local base": (lambda d: d.fields(base_model_name_or_path="/data/models/base"), "local-base", "/data/models/base"),
    "no base": (lambda d: d.fields(base_model_name_or_path=None), "no-base", "is empty"),
    "a branch": (lambda d: d.fields(revision="main"), "no-revision", "may move"),
    "a newer PEFT": (lambda d: d.fields(peft_version="99.0.0", use_magic=True), "unknown-fields", "use_magic=True"),
    "PiSSA": (lambda d: d.fields(init_lora_weights="pissa"), "changing-initialization", "takes a part out of the base"),
    "LoftQ": (lambda d: d.fields(init_lora_weights="loftq"), "lost-initialization", "cannot be repeated"),
    "alpha 0": (lambda d: d.fields(lora_alpha=0), "zero-alpha", "changes nothing"),
    "alpha too large": (lambda d: d.fields(lora_alpha=4096), "odd-scaling", "multiplies updates by 1024"),
    "DoRA without magnitudes": (lambda d: d.fields(use_dora=True), "missing-tensors", "magnitudes"),
    "a head that is not there": (lambda d: d.fields(modules_to_save=["lm_head"]), "missing-tensors", "lm_head"),
    "a target that is not there": (lambda d: d.fields(target_modules=["q_proj", "v_proj", "wq"]), "unused-targets",
                                   "'wq'"),
    "pickles beside": (lambda d: (d.folder / "adapter_model.bin").write_bytes(b"x"), "tensors-beside", "is a pickle"),
    "a pickle alone": (lambda d: os.rename(d.path, d.folder / "adapter_model.bin"), "pickled-weights", "runs code"),
    "code": (lambda d: d.fields(trust_remote_code=True), "configuration", "trust_remote_code"),
    "a tokenizer with code": (lambda d: (d.folder / "tokenizer_config.json").write_text('{"auto_map": {"a": "b"}}'),
                              "tokenizer-code", "auto_map"),
    "half a download": (lambda d: d.path.write_bytes(d.path.read_bytes()[:-9]), "weights", "is not a safetensors file"),
    "no configuration": (lambda d: (d.folder / "adapter_config.json").unlink(), "no-adapter", "adapter_config.json"),
}  # fmt: skip
#: A damage that is another one, too.
ALSO = {
    "size 0": {"shape"},
    "A and B of other ranks": {"other-rank"},
    "a pickle alone": {"no-adapter", "tensors-beside", "weights"},
    "no configuration": {"configuration"},
    "no LoRA": {"whole-embeddings"},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(plain(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Damaged:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return Damaged(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_told_its_damage(damaged: Damaged, damage: str) -> None:
    change, check, says = DAMAGE[damage]
    assert diagnose(damaged.folder).symptoms == ()
    change(damaged)
    found = diagnose(damaged.folder)
    told = [symptom for symptom in found.symptoms if symptom.check == check]
    assert told, found
    assert any(says in f"{symptom.message} {symptom.cure}" for symptom in told), told
    assert names(found) - {check} <= ALSO.get(damage, set())
    assert all(symptom.cure or len(symptom.message) > 80 for symptom in told)
    assert found.exit_code == {"error": 4, "warning": 3, "note": 0}[told[0].severity]


def read_logits(folder: Path, base: Any = None) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base or tiny.llama(), folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


CURED = (
    "compiled", "DDP", "bare names", "wrapped twice", "DDP inside", "FSDP", "a state dict", "loralib", "kohya",
    "base weights", "float64",
)  # fmt: skip


@pytest.mark.parametrize("damage", CURED)
def test_a_cured_copy_computes_what_was_trained(damaged: Damaged, adapter: Path, damage: str, tmp_path: Path) -> None:
    right = read_logits(adapter)
    DAMAGE[damage][0](damaged)
    before = {path.name: path.read_bytes() for path in damaged.folder.iterdir()}
    found = diagnose(damaged.folder, fix=tmp_path / "cured")
    assert all(symptom.curable for symptom in found.symptoms)
    assert found.cured == str(tmp_path / "cured")
    assert diagnose(tmp_path / "cured").symptoms == ()
    assert torch.equal(read_logits(tmp_path / "cured"), right)
    assert {path.name: path.read_bytes() for path in damaged.folder.iterdir()} == before
    if damage not in ("float64", "a state dict"):
        assert not torch.equal(read_logits(damaged.folder), right)


def test_several_damages_are_cured_at_once(damaged: Damaged, adapter: Path, tmp_path: Path) -> None:
    for damage in ("loralib", "wrapped twice", "compiled", "DDP", "float64", "local base"):
        DAMAGE[damage][0](damaged)
    found = diagnose(damaged.folder, fix=tmp_path / "cured", base_model=f"org/base@{COMMIT}")
    assert {"older-layout", "doubled-prefix", "compiled-names", "foreign-prefix", "double-precision"} <= names(found)
    assert diagnose(tmp_path / "cured").symptoms == ()
    assert torch.equal(read_logits(tmp_path / "cured"), read_logits(adapter))
    assert json.loads((tmp_path / "cured" / "adapter_config.json").read_text())["revision"] == COMMIT


def test_a_prefix_of_another_model_is_found_with_the_base_and_cured(damaged: Damaged, tmp_path: Path) -> None:
    right = read_logits(damaged.folder)
    tiny.llama().save_pretrained(tmp_path / "base")
    assert names(diagnose(damaged.folder, base=tmp_path / "base")) == set()
    damaged.rename(lambda name: name.replace(f"{P}model.", f"{P}model.text_model."))
    assert names(diagnose(damaged.folder)) == set()
    [symptom] = diagnose(damaged.folder, base=tmp_path / "base", fix=tmp_path / "cured").symptoms
    assert (symptom.check, symptom.severity, symptom.curable) == ("base", "error", True)
    assert "text_model" in symptom.cure
    assert torch.equal(read_logits(tmp_path / "cured"), right)


def test_another_base_is_told_and_not_cured(damaged: Damaged, tmp_path: Path) -> None:
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "base")
    [symptom] = diagnose(damaged.folder, base=tmp_path / "base").symptoms
    assert (symptom.check, symptom.curable) == ("base", False)
    assert "another shape" in symptom.message


def test_embeddings_that_repeat_the_base_are_left_out_of_the_copy(damaged: Damaged, tmp_path: Path) -> None:
    right = read_logits(damaged.folder)
    tiny.llama().save_pretrained(tmp_path / "base")
    DAMAGE["embeddings"][0](damaged)
    [symptom] = diagnose(damaged.folder, base=tmp_path / "base", fix=tmp_path / "cured").symptoms
    assert "saved by accident" in symptom.message
    assert not any("embed" in name for name in load_file(tmp_path / "cured" / "adapter_model.safetensors"))
    assert torch.equal(read_logits(tmp_path / "cured"), right)


def test_what_cannot_be_cured_stays_and_is_told_of_the_copy_too(damaged: Damaged, tmp_path: Path) -> None:
    DAMAGE["NaN"][0](damaged)
    DAMAGE["compiled"][0](damaged)
    found = diagnose(damaged.folder, fix=tmp_path / "cured")
    assert [symptom.curable for symptom in found.symptoms if symptom.check == "not-finite"] == [False]
    assert names(diagnose(tmp_path / "cured")) == {"not-finite"}


def test_two_tensors_of_one_cured_name_are_not_renamed(damaged: Damaged) -> None:
    damaged.tensors(lambda old: {**old, **{f"module.{name}": tensor + 1 for name, tensor in old.items()}})
    [symptom] = [one for one in diagnose(damaged.folder).symptoms if one.check == "foreign-prefix"]
    assert not symptom.curable


def test_a_folder_that_is_not_empty_is_not_written_to(damaged: Damaged, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "x", damaged.folder):
        with pytest.raises(InvalidAdapter, match="not an empty folder"):
            diagnose(damaged.folder, fix=target)
    DAMAGE["code"][0](damaged)
    with pytest.raises(InvalidAdapter, match="cannot be cured"):
        diagnose(damaged.folder, fix=tmp_path / "new")
    with pytest.raises(UnknownBase, match="org/base"):
        diagnose(damaged.folder, base_model="/a/folder")


def test_a_release_is_examined_without_downloading_large_weights(damaged: Damaged, tmp_path: Path) -> None:
    push_adapter(damaged.folder, "org/name", version="1.0.0", hub=tmp_path / "hub", base_model=f"org/base@{COMMIT}")
    for reference in ("org/name", "org/name@1.0.0", "org/name>=1,<2"):
        assert diagnose(reference, hub=tmp_path / "hub").symptoms == ()
    found = diagnose("org/name", hub=tmp_path / "hub", values=False)
    assert (found.symptoms, list(found.not_read)) == ((), ["values"])
    with pytest.raises(InvalidReference, match="folder 'nothing' does not exist"):
        diagnose("nothing")


# -- repositories without releases -----------------------------------------------------------------------------------


@pytest.fixture(params=EVERY_KIND)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


def read_files(folder: Path, below: str = "") -> dict[str, bytes]:
    return {f"{below}{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("below", "branch", "source"),
    [
        ("", "main", "org/plain"),
        ("", "main", "org/plain@main"),
        ("", "dev", "org/plain@dev"),
        ("", "dev", "org/plain@branch:dev"),
        ("", "main", "org/plain@{commit}"),
        ("a/b/", "main", "org/plain/a/b"),
        ("a/b/", "feature/x", "org/plain/a/b@feature/x"),
        ("a/b/", "dev", "org/plain/a/b@branch:dev"),
        ("a/b/", "main", "org/plain/a/b@{commit}"),
    ],
)
def test_an_adapter_that_nobody_published_is_examined_where_it_is(
    place: Place, damaged: Damaged, below: str, branch: str, source: str
) -> None:
    sound = put(place, read_files(damaged.folder, below), branch=branch)
    found = diagnose(source.format(commit=sound), hub=place.hub)
    assert (found.symptoms, found.not_read) == ((), {})
    DAMAGE["one B is zero"][0](damaged)
    DAMAGE["compiled"][0](damaged)
    commit = put(place, read_files(damaged.folder, below), branch=branch)
    found = diagnose(source.format(commit=commit), hub=place.hub)
    assert names(found) == {"zero-modules", "compiled-names"}
    assert found.title.endswith(f"@{commit}")
    # What a commit held stays what is said of it.
    assert diagnose(f"org/plain{'/' if below else ''}{below.rstrip('/')}@{sound}", hub=place.hub).symptoms == ()


def test_a_change_request_is_examined_before_it_is_accepted(loopback_hub: LoopbackHub, damaged: Damaged) -> None:
    place = LoopbackPlace(loopback_hub)
    put(place, read_files(damaged.folder))
    DAMAGE["NaN"][0](damaged)
    ref = put_request(place, {**read_files(damaged.folder), **read_files(damaged.folder, "best/")})
    for source in (f"org/plain@{ref}", f"org/plain/best@{ref}"):
        found = diagnose(source, hub=place.hub)
        assert names(found) == {"not-finite"}
        assert loopback_hub.repo("org/plain").pull_requests[ref] in found.title
    assert diagnose("org/plain@main", hub=place.hub).symptoms == ()
    with pytest.raises(VersionNotFound, match="has no refs/pr/9"):
        diagnose("org/plain@refs/pr/9", hub=place.hub)


def test_what_is_no_adapter_on_a_branch_is_told_as_damage(place: Place, damaged: Damaged) -> None:
    DAMAGE["a pickle alone"][0](damaged)
    (damaged.folder / "adapter_config.json").unlink()
    put(place, read_files(damaged.folder, "old/"), branch="dev")
    found = diagnose("org/plain/old@dev", hub=place.hub)
    assert {"pickled-weights", "no-adapter"} <= names(found)
    put(place, {"README.md": b"nothing"})
    assert names(diagnose("org/plain", hub=place.hub)) >= {"no-adapter"}


def test_a_folder_or_a_branch_that_is_not_there_says_what_there_is(place: Place, damaged: Damaged) -> None:
    put(place, {**read_files(damaged.folder, "a/"), **read_files(damaged.folder, "b/")})
    for source, says in (
        ("org/plain", "2 unversioned adapters .* a .*, b "),
        ("org/plain@main", "has them in folders: org/plain/a@"),
        ("org/plain/c@main", "no adapter in that folder"),
        ("org/plain/c", "no adapter in that folder. It has them in folders: org/plain/a@"),
        ("org/plain@nothing", "no alias nothing"),
        ("org/plain@branch:nothing", "its branches are main"),
        ("org/plain@" + "0" * 40, "no such commit"),
    ):
        with pytest.raises(VersionNotFound, match=says):
            diagnose(source, hub=place.hub)
    with pytest.raises(NotAdapter):
        diagnose("org/plain@main", hub=place.hub)


def test_of_an_adapter_on_a_branch_only_the_header_is_read(
    place: Place, damaged: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, read_files(damaged.folder, "best/"), branch="dev")
    downloaded: list[str] = []
    download = place.hub.download

    def record(name: str, commit: str, path: str, *rest: Any) -> None:
        downloaded.append(path)
        download(name, commit, path, *rest)

    monkeypatch.setattr(place.hub, "download", record)
    found = diagnose("org/plain/best@dev", hub=place.hub, values=False)
    assert (found.symptoms, list(found.not_read)) == ((), ["values"])
    assert downloaded == ["best/adapter_config.json"]


def test_a_base_is_used_for_an_adapter_of_a_branch(place: Place, damaged: Damaged, tmp_path: Path) -> None:
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "other")
    tiny.llama().save_pretrained(tmp_path / "base")
    put(place, read_files(damaged.folder, "best/"), branch="dev")
    assert diagnose("org/plain/best@dev", hub=place.hub, base=tmp_path / "base").symptoms == ()
    [symptom] = diagnose("org/plain/best@dev", hub=place.hub, base=tmp_path / "other").symptoms
    assert (symptom.check, symptom.severity) == ("base", "error")
    assert "another shape" in symptom.message


# -- the records ---------------------------------------------------------------------------------------------------


def test_the_fields_of_peft_are_read_right_without_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = read_known_fields()
    monkeypatch.delitem(sys.modules, "peft")
    assert read_known_fields() == exact


def test_a_check_of_a_plugin_is_run_and_enforced(
    damaged: Damaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(files: Any) -> list[Finding | str]:
        return [f"The rank is {files.config.rank}"] if files.config.rank > 2 else []

    def fail(files: Any) -> list[Finding | str]:
        raise KeyError("broken")

    added = [
        Check("servable", "error", ("configuration",), find, "Train it with r=2", refused={"push": InvalidAdapter}),
        Check("broken", "warning", ("header",), fail),
    ]
    from lora_plugins.plugins.table import PluginInfo

    info = PluginInfo("mine", "my-plugin", "1.0", builtin=False)
    monkeypatch.setattr("registry.plugin.plugin_checks", lambda: [(info, check) for check in added])
    found = {symptom.check: symptom for symptom in diagnose(damaged.folder).symptoms}
    assert set(found) == {"mine/servable", "mine/broken"}
    assert found["mine/servable"].cure == "Train it with r=2"
    assert "LORA_PLUGINS_BLOCK=mine" in found["mine/broken"].cure
    with pytest.raises(InvalidAdapter, match="The rank is 4"):
        push_adapter(damaged.folder, "org/name", version="1.0.0", hub=tmp_path / "hub", base_model="org/base")


@pytest.mark.parametrize(
    "code",
    [
        "from registry import diagnose; print(len(diagnose({folder!r}, values=False).symptoms))",
        "from lora_plugins.commands.cli import program; program(['doctor', {folder!r}, '--no-values'])",
    ],
    ids=["call", "command"],
)
def test_a_folder_is_examined_in_half_a_second_without_torch(damaged: Damaged, code: str) -> None:
    """The second is printed and not asserted: it is of this machine, and of what else runs on it."""
    code = (
        "import atexit, sys, time\n"
        "heavy = ('torch', 'numpy', 'transformers', 'peft', 'huggingface_hub')\n"
        "atexit.register(lambda: print([x for x in heavy if x in sys.modules], time.process_time(), sep='\\n'))\n"
    ) + code.format(folder=str(damaged.folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, heavy, seconds = done.stdout.splitlines()
    assert heavy == "[]"
    print(f"{float(seconds):.2f} s of processor time, Python's start included")


def test_the_command_prints_a_table_or_json_and_tells_by_its_exit_code(damaged: Damaged, tmp_path: Path) -> None:
    DAMAGE["wrapped twice"][0](damaged)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora_plugins", "doctor", str(damaged.folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    told = run("--fix", str(tmp_path / "cured"))
    assert told.returncode == 4, told
    [row] = [line.split("\t") for line in told.stdout.splitlines() if "\t" in line]
    assert (row[0], row[1]) == ("error", "doubled-prefix")
    assert row[3].endswith("[--fix]")
    assert f"cured copy: {tmp_path / 'cured'}" in told.stdout
    tiny.llama().save_pretrained(tmp_path / "base")
    with_base = run("--json", "--base", str(tmp_path / "base"))
    assert with_base.stderr == ""  # what the libraries say while they are loaded concerns nobody here
    answer = json.loads(with_base.stdout)
    assert answer["severity"] == "error"
    assert answer["symptoms"][0]["curable"] is True
