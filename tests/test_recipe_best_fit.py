"""Best-fit packing: whole examples in few rows, nothing lost uncounted, and a Trainer that learns the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import twin
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, default_data_collator

from lora_plugins import LoraCallback, best_fit_collator, pack_best_fit
from lora_plugins.errors import DataError, UnsupportedPacking
from lora_plugins.recipe.best_fit.batches import BestFitCollator
from lora_plugins.recipe.best_fit.bins import fit_lengths
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.prepare import collator, prepare_data
from lora_plugins.recipe.run import TrainingRun
from lora_plugins.trainer.engines import place_whole

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=80)


def rows_of(lengths: list[int]) -> Dataset:
    """Rows in which every token of the whole data set is another number."""
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, room=st.integers(40, 90))
def test_no_bin_is_overfull_and_none_could_be_spared_easily(lengths: list[int], room: int) -> None:
    bins = fit_lengths(np.asarray(lengths), room)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in members) for members in bins]
    assert max(sums) <= room
    assert [members[0] for members in bins] == sorted(min(members) for members in bins)
    # Best-fit decreasing: at most one bin is less than half full, and 11/9 of the least possible number, and 1.
    assert sum(total <= room / 2 for total in sums) <= 1
    assert len(bins) <= -(-sum(lengths) // room) * 2


def test_rows_are_as_few_as_those_of_trl() -> None:
    pack_dataset = pytest.importorskip("trl").pack_dataset
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(4.5, 0.8, 2000).astype(int) + 2, 512)
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    theirs = pack_dataset(rows, 512, map_kwargs={"batch_size": None})
    assert len(fit_lengths(lengths, 512)) <= len(theirs)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 30), cut=st.booleans())
def test_every_example_is_in_one_row_or_counted(lengths: list[int], batch_size: int, cut: bool) -> None:
    data = rows_of(lengths)
    longest = 25
    if not cut and min(lengths) > longest:
        with pytest.raises(DataError, match="No example of"):
            pack_best_fit(data, longest, batch_size=batch_size)
        return
    packed, counts = pack_best_fit(data, longest, over_long="cut" if cut else "drop", batch_size=batch_size)
    examples = {example[0]: example for row in packed["input_ids"] for example in row}
    too_long = [length for length in lengths if length > longest]
    assert counts.cut == (len(too_long) if cut else 0)
    assert counts.too_long == (0 if cut else len(too_long))
    assert counts.tokens_cut == (sum(length - longest for length in too_long) if cut else 0)
    wanted = [row[:longest] for row in data["input_ids"] if cut or len(row) <= longest]
    assert sorted(examples.values()) == wanted
    assert (counts.examples, counts.kept, counts.chunks) == (len(lengths), len(wanted), len(packed))
    assert counts.tokens == sum(map(len, wanted))
    assert counts.loss_tokens == counts.tokens - counts.kept
    labels = [label for row in packed["labels"] for label in row]
    assert sorted(label[1] for label in labels) == [row[1] for row in wanted]
    assert all(sum(map(len, row)) <= longest for row in packed["input_ids"])


def test_processes_change_nothing() -> None:
    data = rows_of([3, 9, 4, 7, 7, 2, 8, 5, 3, 3, 6])
    alone, counts = pack_best_fit(data, 12)
    several, same = pack_best_fit(data, 12, num_proc=2, batch_size=2)
    assert several[:] == alone[:]
    assert same == counts


def test_an_example_without_a_label_is_left_out_and_counted() -> None:
    """As one whose answer is cut off."""
    ids = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4 + [5, 6], [-100, 8, 9]]})
    packed, counts = pack_best_fit(data, 4, over_long="cut")
    assert packed["input_ids"][:] == [[[7, 8, 9]]]
    assert (counts.without_loss, counts.cut, counts.loss_tokens) == (1, 0, 2)
    assert counts.line() == (
        "2 examples -> 1 kept whole in 1 chunks of up to 4, 75.0% full; 3 tokens, 2 of them in the loss; "
        "1 left out without a token for the loss"
    )


def test_packing_a_file_is_cached_by_length_and_what_becomes_of_long_ones(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"input_ids": {list(range(n + 2))}}}\n' for n in range(9)))
    rows = load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train", cache_dir=str(tmp_path))
    first, _ = pack_best_fit(rows, 8)
    files = set(tmp_path.rglob("*.arrow"))
    pack_best_fit(rows, 8, batch_size=2)
    assert set(tmp_path.rglob("*.arrow")) == files
    cut, _ = pack_best_fit(rows, 8, over_long="cut")
    assert len(cut) > len(first)
    assert cut["labels"][:] == cut["input_ids"][:]


@pytest.mark.parametrize(
    ("length", "over_long", "message"), [(0, "drop", "at least 1"), (4, "split", "'drop' or 'cut'")]
)
def test_senseless_requests_are_refused(length: int, over_long: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack_best_fit(rows_of([5]), length, over_long=over_long)


# -- in a Trainer ------------------------------------------------------------------------------


def _examples() -> Dataset:
    lengths = [4, 7, 3, 9, 5, 6, 8, 2, 4, 10, 3, 3]
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, tiny.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    # The first label of a row predicts nothing, but a Trainer counts it among the tokens of a batch.
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


@pytest.mark.parametrize("make", [tiny.llama, tiny.bloom], ids=["llama", "bloom"])
def test_a_packed_run_learns_what_a_padded_one_learns(make: Any, tmp_path: Path) -> None:
    """The same examples in a step, the same loss and the same adapter; no column that a Trainer would remove."""
    examples = _examples()
    packed, counts = pack_best_fit(examples, 64)
    assert counts.chunks == 1
    runs = []
    for data in (packed, examples):
        model = make()
        padding = DataCollatorForSeq2Seq(twin.make_tokenizer(), padding=True)
        callback = LoraCallback(r=4, lora_dropout=0.0)
        trainer = tiny.trainer(
            tmp_path,
            model,
            [callback],
            data=data,
            trainer_arguments={"data_collator": best_fit_collator(model) if data is packed else padding},
            per_device_train_batch_size=len(data),
            gradient_checkpointing=True,
            max_steps=3,
        )
        trainer.train()
        runs.append(
            ([log["loss"] for log in trainer.state.log_history if "loss" in log], tiny.adapter_tensors(trainer.model))
        )
    (losses, tensors), (padded_losses, padded_tensors) = runs
    assert losses == pytest.approx(padded_losses, abs=1e-5)
    for name, value in tensors.items():
        assert torch.allclose(value, padded_tensors[name], atol=1e-4), name


def test_rows_that_are_one_example_can_be_evaluated_with_the_same_collator() -> None:
    model = tiny.llama().eval()
    batch = best_fit_collator(model)([{"input_ids": [3, 4, 5]}, {"input_ids": torch.tensor([6, 7])}])
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 5], [-100, 7, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]


# -- in the command ----------------------------------------------------------------------------


def _prepare(tmp_path: Path, *words: str) -> tuple[Any, Any, list[str]]:
    file = twin.write_jsonl(tmp_path / "data.jsonl", twin.dialogues(20, seed=3))
    given = ["--model", "m", "--dataset", str(file), "--output_dir", str(tmp_path), "--packing", "best-fit", *words]
    recipe, training = parse(given)
    said: list[str] = []
    return recipe, prepare_data(recipe, training, twin.make_tokenizer(), said.append), said


def test_train_says_what_became_of_the_examples(tmp_path: Path) -> None:
    recipe, data, said = _prepare(tmp_path, "--chunk_length", "140", "--eval_split", "0.2")
    counts = data.counts["train"]
    assert (counts.examples, counts.kept + counts.too_long) == (16, 16)
    assert said[0] == f"Data (train): {counts.line()}"
    assert "kept whole" in said[1]
    batch = collator(recipe, twin.make_tokenizer(), tiny.bloom())([data.train[0]])
    assert batch["attention_mask"].ndim == 4


def test_over_long_examples_are_cut_as_asked(tmp_path: Path) -> None:
    _, dropped, _ = _prepare(tmp_path, "--chunk_length", "100")
    _, cut, said = _prepare(tmp_path, "--chunk_length", "100", "--over_long", "cut")
    assert cut.counts["train"].cut == dropped.counts["train"].too_long > 0
    assert f"{cut.counts['train'].cut} cut, which loses" in said[0]


def test_train_refuses_models_that_cannot_keep_examples_apart(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    recipe, _, _ = _prepare(tmp_path)
    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(UnsupportedPacking, match="MambaForCausalLM"):
        collator(recipe, twin.make_tokenizer(), model)


def _save_base(folder: Path) -> str:
    tiny.llama().save_pretrained(folder)
    twin.make_tokenizer().save_pretrained(folder)
    return str(folder)


def _make_run(tmp_path: Path, *words: str) -> TrainingRun:
    file = twin.write_jsonl(tmp_path / "data.jsonl", twin.dialogues(20, seed=3))
    given = ["--model", _save_base(tmp_path / "base"), "--dataset", str(file), "--output_dir", str(tmp_path / "run")]
    recipe, training = parse([*given, "--use_cpu", "--report_to", "none", *words])
    run = TrainingRun(recipe, training)
    run.tokenizer = twin.make_tokenizer()
    run.data = prepare_data(recipe, training, run.tokenizer, run.say)
    return run


def test_train_tries_the_model_that_the_trainer_has_placed_and_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[bool, bool]] = []

    def watch(model: Any) -> Any:
        tried.append((model in placed, bool(tiny.adapter_tensors(model))))
        return best_fit_collator(model)

    placed: list[Any] = []
    monkeypatch.setattr("lora_plugins.recipe.prepare.best_fit_collator", watch)
    monkeypatch.setattr("lora_plugins.recipe.run.place_whole", lambda trainer: placed.append(trainer.model))
    trainer, _ = _make_run(tmp_path, "--packing", "best-fit", "--chunk_length", "140")._make_trainer()
    assert tried == [(True, True)]
    assert isinstance(trainer.data_collator, BestFitCollator)


@pytest.mark.parametrize("packing", ["none", "wrapped"])
def test_other_packings_reach_the_trainer_and_move_no_model(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_plugins.recipe.run.place_whole", None)
    run = _make_run(tmp_path, "--packing", packing, "--chunk_length", "140")
    trainer, _ = run._make_trainer()
    wanted = DataCollatorForSeq2Seq if packing == "none" else type(default_data_collator)
    assert isinstance(trainer.data_collator, wanted)
    assert trainer.data_collator([trainer.train_dataset[0]])["labels"].shape[0] == 1


def _fake_trainer(**given: Any) -> Any:
    """What `place_whole` reads of a Trainer."""
    stage = given.pop("stage", 0)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(
        **{"is_fsdp_enabled": False, "is_deepspeed_enabled": stage > 0, **given},
        accelerator=SimpleNamespace(state=state),
        model=torch.nn.Linear(2, 2),
        args=SimpleNamespace(device=torch.device("meta")),
    )


@pytest.mark.parametrize(("given", "engine"), [({"is_fsdp_enabled": True}, "FSDP2"), ({"stage": 3}, "ZeRO-3")])
def test_best_fit_is_refused_by_name_where_no_process_holds_the_model(given: dict[str, Any], engine: str) -> None:
    trainer = _fake_trainer(**given)
    with pytest.raises(UnsupportedPacking, match=f"{engine} leaves no process .* --packing none or wrapped"):
        place_whole(trainer)
    assert trainer.model.weight.device.type == "cpu"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_that_each_process_holds_is_tried_on_the_device_it_is_trained_on(stage: int) -> None:
    trainer = _fake_trainer(stage=stage)
    place_whole(trainer)
    assert trainer.model.weight.device.type == "meta"


def test_counting_writes_nothing_but_the_counts(tmp_path: Path) -> None:
    row = f'{{"input_ids": {list(range(500))}}}\n'
    (tmp_path / "data.jsonl").write_text(row * 200)
    rows = load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    before = set(tmp_path.rglob("*.arrow"))
    pack_best_fit(rows, 500)
    sizes = sorted(file.stat().st_size for file in set(tmp_path.rglob("*.arrow")) - before)
    assert len(sizes) == 2
    assert sizes[0] < 200 * 500
