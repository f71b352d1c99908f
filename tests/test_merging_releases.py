"""From a training run over the registry to a merged model, by the command line; the wrong base is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from lora_plugins import Int8PreparationCallback, LoraCallback, prepare_model
from lora_plugins.commands.cli import program
from lora_plugins.errors import AdapterMismatch
from lora_plugins.merging.job import AS_TRAINED, read_job
from lora_plugins.merging.merge import merge_and_save
from registry import pull_adapter, push_adapter
from registry.publishing.callback import PushToRegistryCallback

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_REGISTRY", f"file://{tmp_path / 'registry'}")
    monkeypatch.chdir(tmp_path)
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "base")


def run_command(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        program(list(words))
    assert not end.value.code


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float()


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_trained_by_the_callback_pushed_pulled_and_merged_by_the_command_line(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained("base")
    callbacks = [
        LoraCallback(quantization=backend, compute_dtype="float32", lora_dropout=0.0, **LORA),
        PushToRegistryCallback("org/name", version="1.0.0"),
    ]
    run = tiny.trainer(tmp_path / "run", base, callbacks, learning_rate=0.1)
    run.train()
    run_command("pull", "org/name@1.0.0")
    manifest = pull_adapter("org/name@1.0.0").manifest
    recorded = manifest.training["quantization"]
    assert backend in (recorded, *(recorded.values() if isinstance(recorded, dict) else ()))
    assert backend in Path(pull_adapter("org/name").path, "README.md").read_text()
    capsys.readouterr()
    run_command("merge", "org/name@1.0.0", "merged", "--dtype", "same", "--base", "./base", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["as_trained"]
    assert result["into"] == f"the weights dequantized from {backend}"
    assert result["distance"]["relative"] < 1e-4
    # In evaluation LLM.int8() rounds activations, too.
    trained = logits(run.model.train())
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("merged").eval()), trained, atol=2e-2)


@pytest.mark.parametrize("way", ["loaded quantized", "peft_config of another trainer"])
def test_what_was_quantized_elsewhere_is_known_or_there_is_a_way_out(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained("base", quantization_config=config)
    if way == "loaded quantized":
        trained: Any = prepare_model(loaded, compute_dtype="float32", **LORA)
    else:
        trained = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    push_adapter(trained, "org/name", version="1.0.0")
    job = read_job("org/name@1.0.0", "base", None, AS_TRAINED)
    if job.as_trained:
        assert job.quantization is not None
        assert job.quantization.name == "nf4"
    capsys.readouterr()
    words = ["merge", "org/name@1.0.0", "merged", "--dtype", "same", "--base", "./base", "--json"]
    run_command(*words, "--quantization", '{"name": "nf4", "double_quant": false}')
    assert json.loads(capsys.readouterr().out)["distance"]["relative"] < 1e-3


def test_adapters_of_trl_are_pushed_pulled_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL's own ``peft_config=``, over a base that we quantize and over one that was loaded quantized."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6, 7, 8]] * 16})
    loaded = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    for backend, config, callbacks in (("int8", None, [Int8PreparationCallback()]), ("nf4", loaded, [])):
        base = AutoModelForCausalLM.from_pretrained("base", quantization_config=config)
        trainer = trl.SFTTrainer(
            model=base,
            args=trl.SFTConfig(
                f"run-{backend}", max_steps=3, learning_rate=0.1, report_to=[], use_cpu=True, bf16=False
            ),
            train_dataset=rows,
            processing_class=words(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=callbacks,
        )
        trainer.train()
        reference = f"org/{backend}@1.0.0"
        push_adapter(trainer, f"org/{backend}", version="1.0.0")
        recorded = pull_adapter(reference).manifest.training["quantization"]
        capsys.readouterr()
        # One that somebody else prepared is not known, and the user says it.
        known = [] if backend == "int8" else ["--quantization", "nf4"]
        assert recorded == "not known" if known else recorded["name"] == "int8"
        run_command("merge", reference, f"merged-{backend}", "--dtype", "same", "--base", "./base", "--json", *known)
        assert json.loads(capsys.readouterr().out)["distance"]["relative"] < 1e-3
        merged = AutoModelForCausalLM.from_pretrained(f"merged-{backend}").eval()
        assert torch.allclose(logits(merged), logits(trainer.model.train()), atol=2e-2)


def words() -> PreTrainedTokenizerFast:
    names = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, tiny.VOCABULARY)}}
    core = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def make_release(base: Any) -> None:
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    push_adapter(model, "org/name", version="1.0.0")


def other_values() -> Any:
    return tiny.llama(seed=5, hidden_size=64)


def other_computation() -> Any:
    return tiny.llama(hidden_size=64, rms_norm_eps=1e-3)


def other_size() -> Any:
    return tiny.llama(hidden_size=32)


def other_vocabulary() -> Any:
    model = tiny.llama(hidden_size=64)
    model.resize_token_embeddings(80)
    return model


@pytest.mark.parametrize("make_base", [other_values, other_computation, other_size, other_vocabulary])
def test_another_base_is_refused_and_nothing_is_written(make_base: Any, tmp_path: Path) -> None:
    make_release(AutoModelForCausalLM.from_pretrained("base"))
    make_base().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatch, match=r"was trained on .* and does not fit"):
        merge_and_save("org/name@1.0.0", "merged", base="./other", quantization="none")
    assert not Path("merged").exists()
    merge_and_save("org/name@1.0.0", "merged", base="./base", quantization="none", probe=None)


def test_unknown_field_of_the_configuration_is_refused(tmp_path: Path) -> None:
    make_release(AutoModelForCausalLM.from_pretrained("base"))
    shutil.copytree(pull_adapter("org/name").path, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.chmod(0o644)
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_quantum": True, "peft_version": "99.0"}))
    with pytest.raises((AdapterMismatch, ValueError), match="use_quantum"):
        merge_and_save("./adapter", "merged", base="./base", quantization="none")
    assert not Path("merged").exists()
