"""`lora-plugins try`: what is written with an adapter and without it, streamed, on this machine."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapted
from peft import PeftModel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from twin import CHAT_TEMPLATE, make_tokenizer

import lora_plugins
from lora_plugins.commands.cli import main
from lora_plugins.errors import AdapterMismatch, TrialError
from lora_plugins.serving.trial import Trial, Writing, open_trial
from registry import push_adapter

USER = [{"role": "user", "content": "Amanda: Hi Jerry!"}]
SHORT = Writing(tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` with a tokenizer that has a chat template, ``adapter``, and a registry with its release."""
    root = tmp_path_factory.mktemp("trial")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(root / "base"), r=8, lora_alpha=64)
    model.save_pretrained(root / "adapter")
    push_adapter(model, "org/name", version="1.0.0", hub=root / "registry")
    return root


@pytest.fixture(scope="module")
def trial(folder: Path) -> Trial:
    return open_trial(folder / "adapter")


def write_by_hand(folder: Path, text: str, *, with_adapter: bool) -> str:
    """The likeliest 12 tokens after a text, by PEFT and transformers alone."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    tokenizer = make_tokenizer()
    given = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.eval().generate(input_ids=given, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True))


def test_adapter_and_base_answer_as_peft_and_transformers_do(trial: Trial, folder: Path) -> None:
    text = f"<s>user\n{USER[0]['content']}</s><s>assistant\n"
    answers = {on: trial.answer(USER, SHORT, with_adapter=on) for on in (True, False)}
    assert answers == {on: write_by_hand(folder, text, with_adapter=on) for on in (True, False)}
    assert answers[True] != answers[False]


def test_the_adapter_is_on_again_after_the_base_has_answered(trial: Trial) -> None:
    first = trial.answer(USER, SHORT)
    trial.answer(USER, SHORT, with_adapter=False)
    assert trial.answer(USER, SHORT) == first


def test_a_text_is_continued_as_it_is_when_asked_for(trial: Trial, folder: Path) -> None:
    raw = trial.answer(USER, Writing(tokens=12, raw=True))
    assert raw == write_by_hand(folder, USER[0]["content"], with_adapter=True)
    assert raw != trial.answer(USER, SHORT)


def test_an_answer_comes_in_pieces(trial: Trial) -> None:
    pieces: list[str] = []
    answer = trial.answer(USER, Writing(tokens=40), say=pieces.append)
    assert "".join(pieces) == answer
    assert len([piece for piece in pieces if piece]) > 1


def test_sampling_repeats_by_its_seed(trial: Trial) -> None:
    def sample(seed: int) -> str:
        return trial.answer(USER, Writing(tokens=12, temperature=1.0, seed=seed))

    before = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_conversation_is_remembered(trial: Trial) -> None:
    answer = trial.answer(USER, SHORT)
    longer = [*USER, {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    assert trial.answer(longer, SHORT) != trial.answer(longer[-1:], SHORT)


def test_a_release_is_tried_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_REGISTRY", str(folder / "registry"))
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path))
    found = open_trial("org/name@1.0.0", base=folder / "base")
    assert found.adapter == "org/name@1.0.0"
    assert found.answer(USER, SHORT) == open_trial(folder / "adapter").answer(USER, SHORT)


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(folder / "base")
    LlamaForCausalLM(other.config.__class__(**{**other.config.to_dict(), "hidden_size": 16})).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatch):
        open_trial(folder / "adapter", base=tmp_path)


def test_a_base_that_writes_no_text_is_named(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base")
    adapted(model, target_modules=["query"], task_type="FEATURE_EXTRACTION").save_pretrained(tmp_path / "adapter")
    with pytest.raises(TrialError, match="does not write text: it has no weights for"):
        open_trial(tmp_path / "adapter")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["try", *words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_command_shows_both(folder: Path, trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(folder / "adapter"), "--prompt", USER[0]["content"], "--max-new-tokens", "12")
    assert run(capsys, *words) == trial.answer(USER, SHORT) + "\n"
    found = json.loads(run(capsys, *words, "--compare", "--json"))
    (answer,) = found["answers"]
    assert (found["adapter"], answer["prompt"]) == ("adapter", USER[0]["content"])
    assert answer["adapter"] == trial.answer(USER, SHORT)
    assert answer["base"] == trial.answer(USER, SHORT, with_adapter=False)
    both = run(capsys, *words, "--compare")
    base = trial.answer(USER, SHORT, with_adapter=False)
    assert both == f"adapter:\n{trial.answer(USER, SHORT)}\n\n{folder / 'base'} alone:\n{base}\n\n"


def test_the_command_reads_standard_input_and_talks(
    folder: Path, trial: Trial, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (str(folder / "adapter"), "--max-new-tokens", "12")
    monkeypatch.setattr("sys.stdin", io.StringIO(USER[0]["content"]))
    first = trial.answer(USER, SHORT)
    assert run(capsys, *words) == first + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{USER[0]['content']}\nAnd?\n\nnot read\n"))
    second = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    assert run(capsys, *words, "--chat") == f"{first}\n{trial.answer(second, SHORT)}\n"


def test_a_command_without_a_text_says_what_to_give(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["try", str(folder / "adapter"), "--chat", "--prompt", "Hi"])
    assert ended.value.code == 2
    assert "cannot be combined with --prompt" in " ".join(capsys.readouterr().err.split())


# -- adapters that added tokens, bases that need a package -----------------------------------------

ADDED = ("<sum>", "<end_of_sum>")


def save_grown(folder: Path, target: Path, **lora: Any) -> Path:
    """Train nothing, but add two tokens as a training does: they are in the adapter's files alone."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(list(ADDED))
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(322, mean_resizing=False)
    made = adapted(model, r=8, lora_alpha=64, **lora)
    # By default PEFT (0.21) also writes the copies that modules_to_save keeps, under names that it does not load.
    made.save_pretrained(target, save_embedding_layers=False if "modules_to_save" in lora else "auto")
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [320, 321]}},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved", "rows", "adapted"],
)
def test_an_adapter_that_added_tokens_answers(folder: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    found = open_trial(save_grown(folder, tmp_path / "grown", **lora))
    assert found.model.get_input_embeddings().weight.shape[0] == 322
    assert found.tokenizer.convert_tokens_to_ids(ADDED[1]) == 321
    asked = [{"role": "user", "content": f"{ADDED[0]} Hi"}]
    assert found.answer(asked, SHORT) == found.answer(asked, SHORT)


def test_a_base_whose_format_needs_a_package_names_it(folder: Path, tmp_path: Path) -> None:
    """An ImportError of transformers would be a traceback."""
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrialError, match=r"base cannot be loaded .*(?i:gptq|optimum)"):
        open_trial(folder / "adapter", base=tmp_path / "base")


def test_a_tokenizer_of_any_kind_that_the_adapter_brings_is_taken(folder: Path, tmp_path: Path) -> None:
    """Each file that the registry publishes with a tokenizer marks one, not only those of the common kinds."""
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(TrialError, match="adapter has no tokenizer that can be loaded"):
        open_trial(tmp_path / "adapter")


def test_open_trial_is_a_public_name() -> None:
    assert lora_plugins.open_trial is open_trial
