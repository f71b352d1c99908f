"""Reading data sets and turning their rows into tokens and labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import twin
from datasets import Dataset, DatasetDict
from tokenizers import pre_tokenizers, trainers

from lora_plugins.errors import ArgumentsError, DataError, TemplateError
from lora_plugins.recipe.arguments import TEMPLATE
from lora_plugins.recipe.data import load_examples, load_splits
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.prepare import collator, prepare_data
from lora_plugins.recipe.templates import encode, make_template

ROWS = twin.dialogues(6)
COLUMNS = ["id", "dialogue", "summary"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = twin.make_tokenizer()
    made.chat_template = twin.CHAT_TEMPLATE
    return made


# -- data sets ---------------------------------------------------------------------------------


def write(folder: Path, kind: str) -> Path:
    """Write the rows in one of the formats."""
    rows = Dataset.from_list(ROWS)
    if kind == "folder":
        rows.save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "splits":
        DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "saved")
        return folder / "saved"
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        twin.write_jsonl(path, ROWS)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "splits"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = load_splits(str(write(tmp_path, kind)))["train"]
    assert [(row["dialogue"], row["summary"]) for row in rows] == [(row["dialogue"], row["summary"]) for row in ROWS]


def test_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    twin.write_jsonl(tmp_path / "b.jsonl", ROWS[3:])
    twin.write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "manifest.txt").write_text("not data")
    splits = load_splits(str(tmp_path))
    assert list(splits) == ["train"]
    assert splits["train"]["id"][:] == [row["id"] for row in ROWS]


def test_names_of_files_in_a_folder_say_their_split(tmp_path: Path) -> None:
    """Rows to test on must not be trained on because they lie in the same folder."""
    twin.write_jsonl(tmp_path / "samsum-train-1.jsonl", ROWS[:2])
    twin.write_jsonl(tmp_path / "samsum-train-2.jsonl", ROWS[2:3])
    twin.write_jsonl(tmp_path / "samsum_test.jsonl", ROWS[3:])
    twin.write_jsonl(tmp_path / "val.jsonl", ROWS[:1])
    assert {name: len(rows) for name, rows in load_splits(str(tmp_path)).items()} == {
        "train": 3,
        "test": 3,
        "validation": 1,
    }
    twin.write_jsonl(tmp_path / "latest.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"latest\.jsonl, whose name says none"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_data_without_splits_have_none_to_evaluate_on(tmp_path: Path, kind: str) -> None:
    """The whole of it would be what was trained on."""
    with pytest.raises(DataError, match=r"no split 'test'; it has train\. Hold out a share"):
        examples("--dataset", str(write(tmp_path, kind)), "--eval_split", "test")


def test_several_splits_of_an_evaluation_set_need_a_choice(tmp_path: Path) -> None:
    saved = str(write(tmp_path, "splits"))
    file = str(twin.write_jsonl(tmp_path / "other.jsonl", ROWS[:2]))
    with pytest.raises(DataError, match=r"several splits: train, test\. Choose with --eval_split"):
        examples("--dataset", file, "--eval_dataset", saved)
    held_out = examples("--dataset", file, "--eval_dataset", saved, "--eval_split", "test")[1]
    assert held_out is not None
    assert len(held_out) == 1


@pytest.mark.parametrize(
    ("prepare", "source", "message"),
    [
        (lambda folder: None, "missing.jsonl", "missing.jsonl is not there"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt", "none of the files that can be read"),
        (lambda folder: (folder / "empty").mkdir(), "empty", "has neither .json, .jsonl, .csv, .parquet files"),
        (lambda folder: (folder / "bad.jsonl").write_text('{"a": 1}\n{"a"'), "bad.jsonl", "cannot be read"),
        (lambda folder: (folder / "none.csv").write_text("dialogue,summary\n"), "none.csv", "no data"),
        (lambda folder: write(folder, "splits"), "saved", "has no split 'dev'; it has train, test"),
    ],
)
def test_unreadable_data_is_named(tmp_path: Path, prepare: Any, source: str, message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError) as caught:
        examples("--dataset", str(tmp_path / source), "--train_split", "dev")
    assert message in str(caught.value)


def test_mixed_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    write(tmp_path, "jsonl")
    with pytest.raises(DataError, match="mixes kinds of files"):
        load_splits(str(tmp_path))


def test_hub_id_without_a_network_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="some/dataset cannot be read"):
        load_splits("some/dataset")


def examples(*words: str) -> tuple[Dataset, Dataset | None]:
    return load_examples(parse(["--model", "m", *words])[0], seed=1)


def test_held_out_share_is_disjoint_and_repeatable(tmp_path: Path) -> None:
    file = str(write(tmp_path, "jsonl"))
    train, held_out = examples("--dataset", file, "--eval_split", "0.34")
    assert held_out is not None
    assert (len(train), len(held_out)) == (4, 2)
    assert {*train["id"], *held_out["id"]} == {row["id"] for row in ROWS}
    again = examples("--dataset", file, "--eval_split", "0.34")[1]
    assert again is not None
    assert again["id"][:] == held_out["id"][:]
    with pytest.raises(DataError, match="is 0: nothing is left"):
        examples("--dataset", file, "--eval_split", "0.01")


def test_named_splits_and_another_data_set(tmp_path: Path) -> None:
    saved = str(write(tmp_path, "splits"))
    train, held_out = examples("--dataset", saved, "--eval_split", "test")
    assert held_out is not None
    assert (len(train), len(held_out)) == (6, 1)
    file = str(twin.write_jsonl(tmp_path / "other.jsonl", ROWS[:2]))
    train, held_out = examples("--dataset", saved, "--eval_dataset", file)
    assert held_out is not None
    assert (len(train), len(held_out)) == (6, 2)


# -- templates ---------------------------------------------------------------------------------


def encoded(rows: list[dict[str, Any]], template: str, tokenizer: Any, *, completion_only: bool) -> tuple[Dataset, int]:
    data = Dataset.from_list(rows)
    return encode(
        data, make_template(template, data.column_names, tokenizer), tokenizer, completion_only=completion_only
    )


def labelled(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_recipe_template_gives_the_recipe_text(tokenizer: Any) -> None:
    made, unusable = encoded(ROWS, TEMPLATE, tokenizer, completion_only=False)
    first = ROWS[0]
    text = f"Summarize the chat dialogue:\n{first['dialogue']}\n---\nSummary:\n{first['summary']}</s>"
    assert tokenizer.decode(made[0]["input_ids"]) == text
    assert made[0]["labels"] == made[0]["input_ids"]
    assert made[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert not unusable


def test_loss_on_the_completion_and_its_end(tokenizer: Any) -> None:
    whole, _ = encoded(ROWS, TEMPLATE, tokenizer, completion_only=False)
    made, _ = encoded(ROWS, TEMPLATE, tokenizer, completion_only=True)
    assert made["input_ids"][:] == whole["input_ids"][:]
    for row, source in zip(made, ROWS, strict=True):
        assert labelled(tokenizer, row) == source["summary"] + "</s>"
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_completion_in_letters_of_several_bytes(tokenizer: Any) -> None:
    made, _ = encoded([{"q": "naïve 😀?", "a": "déjà 😀!"}], "{q}\\n{a}{eos_token}", tokenizer, completion_only=True)
    assert labelled(tokenizer, made[0]) == "déjà 😀!</s>"


@pytest.mark.parametrize("space", ["A: {a}", "A:{a}", "A:\\n{a}", "A: ({a})"])
def test_first_token_of_a_completion_counts_even_with_the_space_before_it(space: str) -> None:
    """Byte-level tokenizers write ' Paris' as one token: a short answer is nothing but that."""
    tokenizer = twin.make_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.backend_tokenizer.train_from_iterator(["Paris Paris A: Paris (Paris)"] * 9, trainer)
    made, _ = encoded([{"q": "1", "a": "Paris"}], "{q}\\n" + space, tokenizer, completion_only=True)
    assert "Paris" in labelled(tokenizer, made[0])
    assert "A" not in labelled(tokenizer, made[0])


def test_columns_of_lists_are_no_text(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"messages": CONVERSATION}])
    with pytest.raises(TemplateError, match=r"'messages', which holds no text.*--template chat"):
        make_template("{messages}", rows.features, tokenizer)
    with pytest.raises(TemplateError, match="For the conversations in 'messages', use --template chat"):
        make_template(TEMPLATE, rows.features, tokenizer)


def test_backslash_n_is_a_new_line_and_double_braces_are_braces(tokenizer: Any) -> None:
    made, _ = encoded([{"q": "1", "a": "2"}], "{{x}}{q}\\n{a}", tokenizer, completion_only=False)
    assert tokenizer.decode(made[0]["input_ids"]) == "{x}1\n2"


def test_rows_with_an_empty_column_are_left_out_and_counted(tokenizer: Any) -> None:
    rows = [*ROWS, {"id": "x", "dialogue": None, "summary": "s"}, {"id": "y", "dialogue": "d", "summary": " "}]
    made, unusable = encoded(rows, TEMPLATE, tokenizer, completion_only=False)
    assert (len(made), unusable) == (6, 2)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{dialog}{summary}",
            "the column 'dialog' and the data set has: id, dialogue, summary. Did you mean {dialogue}",
        ),
        ("no column", "names no column"),
        ("{eos_token}", "names no column"),
        ("{dialogue", "cannot be read"),
        ("{dialogue[0]}", "not the plain name of a column"),
        ("{dialogue!r}", "not the plain name of a column"),
        ("{}", "not the plain name of a column"),
    ],
)
def test_mistakes_in_templates_are_named(template: str, message: str, tokenizer: Any) -> None:
    with pytest.raises(TemplateError) as caught:
        make_template(template, COLUMNS, tokenizer)
    assert message in str(caught.value)


def test_template_with_a_token_that_the_tokenizer_lacks() -> None:
    tokenizer = twin.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match=r"\{eos_token\} and the tokenizer has none"):
        make_template(TEMPLATE, COLUMNS, tokenizer)


# -- conversations -----------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, can I have cookies?"},
    {"role": "assistant", "content": "Sure!"},
    {"role": "user", "content": "Thanks :-)"},
    {"role": "assistant", "content": "Great."},
]


def test_chat_loss_is_on_every_turn_of_the_assistant(tokenizer: Any) -> None:
    made, _ = encoded([{"messages": CONVERSATION}], "chat", tokenizer, completion_only=True)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(made[0]["input_ids"]) == text
    assert labelled(tokenizer, made[0]) == "Sure!</s>Great.</s>"


def test_chat_loss_on_all(tokenizer: Any) -> None:
    made, _ = encoded([{"messages": CONVERSATION}], "chat", tokenizer, completion_only=False)
    assert made[0]["labels"] == made[0]["input_ids"]


def test_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = twin.make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + twin.CHAT_TEMPLATE
    with pytest.raises(TemplateError, match="turn 2"):
        encoded([{"messages": CONVERSATION}], "chat", tokenizer, completion_only=True)


def test_chat_needs_messages_and_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="reads the column 'messages'"):
        make_template("chat", COLUMNS, tokenizer)
    with pytest.raises(TemplateError, match="no chat template"):
        make_template("chat", ["messages"], twin.make_tokenizer())


# -- together ----------------------------------------------------------------------------------


def test_padded_batches_train_on_the_summaries_only(tmp_path: Path, tokenizer: Any) -> None:
    words = ["--dataset", str(write(tmp_path, "jsonl")), "--loss_on", "completion", "--output_dir", str(tmp_path)]
    recipe, training = parse(["--model", "m", *words])
    said: list[str] = []
    data = prepare_data(recipe, training, tokenizer, said.append)
    batch = collator(recipe, tokenizer, None)([data.train[index] for index in range(6)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].min() == 0, "the rows differ in length"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert "6 examples -> 6 kept" in said[0]


def test_packed_completions_keep_their_labels(tmp_path: Path, tokenizer: Any) -> None:
    words = ["--loss_on", "completion", "--packing", "true", "--chunk_length", "32", "--output_dir", str(tmp_path)]
    recipe, training = parse(["--model", "m", "--dataset", str(write(tmp_path, "jsonl")), *words])
    data = prepare_data(recipe, training, tokenizer, lambda text: None)
    labels = [label for row in data.train["labels"] for label in row if label != -100]
    assert tokenizer.decode(labels).startswith(ROWS[0]["summary"] + "</s>" + ROWS[1]["summary"])


def test_small_held_out_set_is_one_shorter_chunk(tmp_path: Path, tokenizer: Any) -> None:
    saved = str(write(tmp_path, "splits"))
    words = ["--eval_split", "test", "--chunk_length", "100", "--output_dir", str(tmp_path)]
    recipe, training = parse(["--model", "m", "--dataset", saved, *words])
    data = prepare_data(recipe, training, tokenizer, lambda text: None)
    assert data.held_out is not None
    assert len(data.held_out) == 1
    assert data.counts["held_out"].tokens == len(data.held_out[0]["input_ids"]) < 100


def test_padding_without_a_token_for_it_is_refused(tokenizer: Any) -> None:
    bare = twin.make_tokenizer()
    bare.pad_token = bare.eos_token = None
    recipe = parse(["--model", "m", "--dataset", "d", "--packing", "false"])[0]
    with pytest.raises(ArgumentsError, match="neither a padding nor an end token"):
        collator(recipe, bare, None)
