"""Every tensor that was trained is in the files and comes back; no local path in a card; no network while saving."""

from __future__ import annotations

import copy
import pwd
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, detach, prepare_model
from lora_plugins.adapters.files import adapter_folder
from lora_plugins.adapters.saving import find_unsaved, is_local_path
from lora_plugins.errors import BrokenCheckpoint, UnsavedTensors
from lora_plugins.merging.merge import merge_and_save
from lora_plugins.planning.source import find_base, read_config
from lora_plugins.recipe.data import load_splits
from lora_plugins.serving.export import export_adapter
from registry import FolderHub, diagnose, is_path, open_hub, pull_adapter, push_adapter
from registry.base.choice import describe_base
from registry.errors import InvalidReference, MachineError

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
BEST: dict[str, Any] = {
    **SAVING,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "max_steps": 8,
}


def two_adapters() -> Any:
    """A model with two active adapters, both trained, neither called "default"."""
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**{**config, "target_modules": ["o_proj"]}))
    model.base_model.set_adapter(["one", "two"])
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"one", "two"}
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the adapters in a folder, by adapter and name."""
    files = sorted(folder.rglob("adapter_model.safetensors"))
    return {f"{file.parent.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Remember(TrainerCallback):
    """Keeps what was trained at each save."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[state.global_step] = trained(kwargs["model"])


# -- what is in the files ----------------------------------------------------------------------


@pytest.mark.parametrize("callback", [LoraCallback, Int8PreparationCallback])
def test_parameters_that_the_user_unfroze_are_named_before_training(tmp_path: Path, callback: Any) -> None:
    model = prepare_model(tiny.llama(), r=4)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.requires_grad_(True)
    trainer = tiny.trainer(tmp_path, model, [callback()])
    with pytest.raises(UnsavedTensors, match=r"4 tensors are trained.*modules_to_save=\['input_layernorm', 'post_"):
        trainer.train()


def test_modules_to_save_is_the_way_out(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, modules_to_save=["input_layernorm"])], **SAVING)
    trainer.train()
    trainer.save_model()
    now = trained(trainer.model)
    assert sum("layernorm" in name for name in now) == 2
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert all(torch.equal(value, now[name]) for name, value in trained(again).items())


def test_whoever_wants_it_so_trains_what_is_not_saved(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(skip_checks=["unsaved-tensors"])], **SAVING)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


def _unfreeze_norm(model: Any) -> str:
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return "model.norm.weight"


def _unfreeze_embeddings(model: Any) -> str:
    model.get_input_embeddings().weight.requires_grad_(True)
    return "embed_tokens.weight"


def _add_module(model: Any) -> str:
    model.base_model.model.value_head = nn.Linear(4, 1)
    return "value_head.weight"


def _add_bias(model: Any) -> str:
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias = nn.Parameter(torch.zeros(32))
    return "q_proj.base_layer.bias"


@pytest.mark.parametrize("change", [_unfreeze_norm, _unfreeze_embeddings, _add_module, _add_bias])
def test_whatever_saves_fails_where_a_trained_tensor_is_lost(tmp_path: Path, change: Any) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)])
    assert find_unsaved(trainer.model) == []
    base = trainer.model.get_base_model()
    name = change(trainer.model)
    for save in (
        trainer.save_model,
        lambda: trainer.model.save_pretrained(tmp_path / "own"),
        lambda: base.save_pretrained(tmp_path / "base"),
        trainer.train,
    ):
        with pytest.raises(UnsavedTensors, match=name):
            save()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
def test_what_peft_saves_is_not_called_lost(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(attention_bias=True), r=4, **arguments)
    assert find_unsaved(model) == []
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["q_proj"], r=2),
        peft.VeraConfig(target_modules=["q_proj"], r=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft_are_saved_and_resumed(config: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.llama(), copy.deepcopy(config))
    assert find_unsaved(model) == []
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback()], **SAVING)
    trainer.train()
    assert find_unsaved(trainer.model) == []
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("save", ["checkpoint", "save_model"])
@pytest.mark.parametrize("name", ["default", "mylora"])
def test_files_of_every_callback_are_compared_with_the_model(tmp_path: Path, save: str, name: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny.llama(), config, adapter_name=name)
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback()], **SAVING)
    write = trainer.model.save_pretrained

    def spoil(folder: Any, **kwargs: Any) -> None:
        write(folder, **kwargs)
        file = Path(folder, "" if name == "default" else name, "adapter_model.safetensors")
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)

    trainer.model.save_pretrained = spoil
    with pytest.raises(BrokenCheckpoint, match="not what the model holds"):
        trainer.train() if save == "checkpoint" else trainer.save_model()


# -- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["LoraCallback", "Int8PreparationCallback", "two adapters", "two adapters, int8"])
def test_best_model_restores_every_adapter_whatever_its_name(tmp_path: Path, case: str) -> None:
    remember = Remember()
    if case == "LoraCallback":
        model, callback = tiny.llama(), LoraCallback(r=4, adapter_name="mylora")
    elif case == "Int8PreparationCallback":
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])
        model, callback = peft.get_peft_model(tiny.llama(), config, adapter_name="mylora"), Int8PreparationCallback()
    else:
        model = two_adapters()
        callback = LoraCallback() if case == "two adapters" else Int8PreparationCallback()
    trainer = tiny.trainer(
        tmp_path,
        model,
        [callback, remember],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=5)},
        **BEST,
    )
    active = list(trainer.model.active_adapters)
    trainer.train()
    best = int(Path(trainer.state.best_model_checkpoint).name.rpartition("-")[2])
    assert best < 8, "the loss falls, and the largest was asked for"
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in remember.states[best].items())
    assert list(trainer.model.active_adapters) == active
    assert {name for name, p in now.items() if p.requires_grad} == remember.states[best].keys()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_resuming_restores_and_trains_every_active_adapter(tmp_path: Path, quantization: str | None) -> None:
    def run(folder: Path, steps: int) -> Any:
        callback = Int8PreparationCallback() if quantization else LoraCallback()
        return tiny.trainer(folder, two_adapters(), [callback], max_steps=steps, lr_scheduler_type="constant", **SAVING)

    whole = run(tmp_path / "whole", 4)
    whole.train()
    resumed = run(tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert list(resumed.model.active_adapters) == ["one", "two"]
    one, other = trained(whole.model), trained(resumed.model)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


def test_resuming_with_one_adapter_of_two_missing_is_named(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, two_adapters(), [LoraCallback()], max_steps=2, **SAVING)
    trainer.train()
    (tmp_path / "checkpoint-2" / "two" / "adapter_model.safetensors").unlink()
    again = tiny.trainer(tmp_path, two_adapters(), [LoraCallback()], **SAVING)
    with pytest.raises(BrokenCheckpoint, match="adapter 'two'"):
        again.train(resume_from_checkpoint=True)


# -- what the user holds -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["callback", "attach", "prepare_model", "peft"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_users_own_variable_saves_what_was_trained(tmp_path: Path, how: str, quantization: str | None) -> None:
    model = tiny.llama()
    settings: dict[str, Any] = {"r": 4, "quantization": quantization}
    if how == "callback":
        trainer = tiny.trainer(tmp_path, model, [LoraCallback(**settings)])
    elif how == "attach":
        trainer = tiny.trainer(tmp_path, model)
        attach(trainer, **settings)
    elif how == "prepare_model":
        trainer = tiny.trainer(tmp_path, prepare_model(model, **settings), [LoraCallback()])
    else:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        trainer = tiny.trainer(tmp_path, wrapped, [Int8PreparationCallback()])
    trainer.train()
    model.save_pretrained(tmp_path / "mine")
    expected = trained(trainer.model)
    again = trained(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "mine", is_trainable=True))
    assert expected.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_copy_of_the_model_saves_itself_and_not_its_original(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.fill_(3.0)
    other.get_base_model().save_pretrained(tmp_path)
    assert all(bool((tensor == 3).all()) for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


def test_without_adapters_the_base_model_saves_itself_again(tmp_path: Path) -> None:
    model = tiny.llama()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)])
    trainer.train()
    detach(trainer).save_pretrained(tmp_path / "detached")
    assert "save_pretrained" not in vars(model)
    detached = load_file(tmp_path / "detached" / "model.safetensors")
    assert all(torch.equal(detached[name], plain[name]) for name in detached)
    merged = prepare_model(tiny.llama(), r=4).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == detached.keys()


# -- cards and the network ---------------------------------------------------------------------


def test_no_card_names_a_folder_of_this_machine(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = type(tiny.llama()).from_pretrained(tmp_path / "base")
    trainer = tiny.trainer(tmp_path / "run", model, [LoraCallback(r=4)], **SAVING)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    trainer.model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "variable")
    cards = sorted(tmp_path.rglob("README.md"))
    assert len(cards) == 5
    for card in cards:
        assert str(tmp_path) not in card.read_text(), card
        assert ModelCard.load(card).data.get("base_model") is None
        assert ModelCard.load(card).data.library_name == "peft"


def test_the_id_of_a_hub_stays_in_the_card(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config._name_or_path = model.name_or_path = "org/base"
    prepare_model(model, r=4).save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/base"
    assert "base_model:adapter:org/base" in data.tags


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("org/base", False),
        ("gpt2", False),
        ("/models/base", True),
        ("./base", True),
        ("../base", True),
        ("~/base", True),
        ("models/llama/base", True),
        ("C:\\models\\base", True),
    ],
)
def test_which_names_are_folders(name: str, local: bool) -> None:
    assert is_local_path(name) is local


def test_a_folder_with_the_form_of_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "k2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local_path("models/k2")


#: Paths by their form, none of them on disk; the last ones were taken for names in some places.
PATHS = ("/nowhere/x", "./nowhere", "../nowhere", "~/nowhere", ".nowhere/x", "nowhere\\x", "C:\\nowhere\\x")
#: Names and references: nothing that has their form is a path.
NAMES = ("gpt2", "org/base", "org/a@1.0.0", "org/a>=1,<2", "org/a/sub/folder@best", "nowhere.json/x", "a~b", "a.b/c.d")


def refusal(ask: Callable[[Any], object], value: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each place has an error of its own
        ask(value)
    return str(caught.value)


@pytest.mark.parametrize("value", [*PATHS, Path("nowhere/x")], ids=str)
def test_what_is_visibly_a_path_is_one_in_every_place(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_path(value)
    assert isinstance(open_hub(value), FolderHub)
    assert "does not exist" in refusal(lambda given: describe_base(given, None, None, None), value)  # type: ignore[arg-type]
    assert "has no adapter_config.json" in refusal(adapter_folder, value)
    assert "does not exist" in refusal(read_config, value)
    assert "is not there" in refusal(load_splits, str(value)) or isinstance(value, Path)
    assert is_local_path(str(value)) or isinstance(value, Path)


@pytest.mark.parametrize("value", NAMES)
def test_names_and_references_are_not_paths(value: str) -> None:
    assert not is_path(value)
    with pytest.raises(InvalidReference, match="is not a registry"):
        open_hub(value)


PLACES = {
    "hub": open_hub,
    "cache": lambda value: pull_adapter("org/a", hub="/nowhere", cache_dir=value),
    "base": lambda value: describe_base(value, None, None, None),  # type: ignore[arg-type]
    "adapter": adapter_folder,
    "data": load_splits,
    "merge": lambda value: merge_and_save(value, "/nowhere/merged"),
    "export": lambda value: export_adapter(value, "/nowhere/exported", to="peft"),
    "merged model": lambda value: merge_and_save("./nowhere", value),
    "exported adapter": lambda value: export_adapter("./nowhere", value, to="peft"),
    "push": lambda value: push_adapter(Path(value), "org/a", version="1.0.0", hub="/nowhere"),
    "doctor": diagnose,
}


@pytest.mark.parametrize("value", ["~/nowhere", "~nobody-here/x"])
@pytest.mark.parametrize("place", PLACES)
def test_a_home_that_is_not_known_is_an_error_that_says_so(
    place: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # a container whose user is not in /etc/passwd
    with pytest.raises(MachineError, match=f"'{value}' cannot be found: the home folder is not known.*or set HOME"):
        PLACES[place](value)


def test_a_home_folder_is_found_for_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.llama().save_pretrained(tmp_path / "base")
    assert read_config("~/base").model_type == "llama"
    assert find_base("~/base") == tmp_path / "base"


def test_saving_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail(f"looked {args[0]} up"))
    model = tiny.llama()
    model.config._name_or_path = model.name_or_path = "org/base"
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)], **SAVING)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*config file.*")
        trainer.train()
        trainer.save_model()
        model.save_pretrained(tmp_path / "variable")


def test_resized_embeddings_are_saved_without_asking_anyone(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    # New rows that are trained are saved alone; rows that nobody trains come with both whole embeddings.
    frozen = ["embed_tokens", "lm_head"]
    grown = tiny.VOCABULARY + 4
    for rows, left, saved in ((tiny.VOCABULARY, [], []), (grown, [], [4, 4]), (grown, frozen, [grown, grown])):
        model = type(tiny.llama()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(rows)
        prepare_model(model, r=4, frozen=left).save_pretrained(tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert [value.shape[0] for key, value in stored.items() if "lora_" not in key] == saved, rows
