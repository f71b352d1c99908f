"""Recording a lineage never ends a run: what cannot be read is said, and the training goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pyarrow
import pytest
import tiny
from datasets import Dataset
from torch.utils.data import ChainDataset, IterableDataset, TensorDataset

from lora_plugins import LoraCallback, prepare_model
from lora_plugins.adapters.lineage import recording, rows
from lora_plugins.adapters.lineage.environment import describe_code
from lora_plugins.adapters.lineage.recording import declare_lineage, read_recorded
from lora_plugins.adapters.lineage.rows import describe_rows
from lora_plugins.recipe.report.collect import collect_facts
from lora_plugins.recipe.reproduction.differences import compare_data
from registry import clean_lineage, list_lineage, push_adapter, read_lineage
from registry.checks.lineage import compare_lineage
from registry.publishing.source import collect


class Stream(IterableDataset):  # type: ignore[misc]
    """Rows without a number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(tiny.rows())


class Odd(TensorDataset):  # type: ignore[misc]
    """Rows whose every fact fails."""

    def __init__(self) -> None:
        super().__init__()

    def __len__(self) -> int:
        raise RuntimeError("not yet")

    @property
    def column_names(self) -> Any:
        raise OSError("gone")

    @property
    def info(self) -> Any:
        raise KeyError("x")


class Torn(Dataset):  # type: ignore[misc]
    """Rows in a table that cannot be read."""

    def with_format(self, *args: Any, **kwargs: Any) -> Any:
        raise pyarrow.ArrowInvalid("torn")


# -- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [Stream(), ChainDataset([Stream(), Stream()])], ids=["stream", "chain"])
def test_streams_without_a_number_of_rows_are_described(data: Any) -> None:
    facts, missing = describe_rows(data)
    assert "rows" not in facts
    assert (missing["rows"], missing["sha256"]) == ("the data are streamed", "the data are streamed")


def test_rows_whose_facts_fail_are_described_without_them() -> None:
    facts, missing = describe_rows({"train": Odd()})
    assert facts == {"train": {}}
    assert missing["train.rows"] == "could not be read (RuntimeError)"
    assert missing["train.columns"] == "could not be read (OSError)"
    assert missing["train.id"] == "could not be read (KeyError)"


def test_a_table_that_cannot_be_read_is_not_hashed_and_its_rows_are_counted() -> None:
    facts, missing = describe_rows(Torn(pyarrow_table(3)))
    assert facts == {"rows": 3, "columns": ["a"]}
    assert missing["sha256"] == "could not be read (ArrowInvalid)"


def pyarrow_table(count: int) -> Any:
    return Dataset.from_dict({"a": list(range(count))}).data


def test_a_few_rows_of_a_large_table_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_BYTES", 1000)
    data = Dataset.from_dict({"a": list(range(1000))})
    assert "8,000 bytes" in describe_rows(data)[1]["sha256"]
    assert "sha256" in describe_rows(data.select([5, 3, 900]))[0]


def test_shuffled_rows_are_hashed_up_to_a_bound_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_SHUFFLED_BYTES", 1000)
    data = Dataset.from_dict({"a": list(range(1000))})
    assert "sha256" in describe_rows(data)[0]
    missing = describe_rows(data.shuffle(seed=1))[1]["sha256"]
    assert missing == "the data are shuffled or selected and have 8,000 bytes; above 1,000 they are not hashed"


def test_hashing_ends_when_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_SECONDS", -1.0)
    facts, missing = describe_rows(Dataset.from_dict({"a": list(range(3000))}))
    assert facts == {"rows": 3000, "columns": ["a"]}
    assert "longer than" in missing["sha256"]


def test_several_data_sets_to_evaluate_on_are_shown_and_compared() -> None:
    def describe(other: int) -> dict[str, Any]:
        parts = {"code": Dataset.from_dict({"a": [1]}), "text": Dataset.from_dict({"a": [other]})}
        return describe_rows({"train": Dataset.from_dict({"a": [1]}), "eval": parts})[0]

    shown = dict(list_lineage(clean_lineage({"dataset": describe(1)})))
    assert shown["data set: eval.text"].startswith("1 rows; columns a; sha256 ")
    assert shown["data set: eval.code"].startswith("1 rows; columns a; sha256 ")
    (difference,) = compare_data("dataset", describe(1), describe(2))
    assert difference.field == "dataset.eval.text.sha256"
    assert "dataset.eval.text.sha256" in compare_lineage({"dataset": describe(1)}, {"dataset": describe(2)})


# -- the run -----------------------------------------------------------------------------------


def test_file_names_that_are_not_text_do_not_end_a_run(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        settings = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init", "-q")
    git("config", "core.quotePath", "false")
    (tmp_path / "train.py").write_text("1")
    odd = os.path.join(os.fsencode(tmp_path), b"\xff.txt")
    with open(odd, "wb") as file:
        file.write(b"1")
    git("add", ".")
    git("commit", "-qm", "x")
    with open(odd, "wb") as file:
        file.write(b"changed")
    found = describe_code(tmp_path / "train.py", "the script")
    assert isinstance(found, dict)
    assert found["dirty"]


def test_a_run_goes_on_where_parts_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("no")

    for name in ("describe_hardware", "describe_libraries", "describe_trackers", "describe_code", "describe_rows"):
        monkeypatch.setattr(recording, name, fail)
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], save_strategy="steps", save_steps=2, max_steps=2)
    declare_lineage(trainer.model, fail)
    trainer.train()
    found = read_recorded(trainer.model)
    assert found is not None
    missing = found["not_recorded"]
    for name in ("hardware", "libraries", "tracker", "code", "dataset", "recipe"):
        assert missing[name] == "could not be read (PermissionError)"
    assert found["parent"] == "none"
    assert (tmp_path / "checkpoint-2" / "lineage.json").is_file()


# -- whose weights -----------------------------------------------------------------------------

OTHER = [("lineage", "not recorded: it belongs to other weights")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whose")
    tiny.llama().save_pretrained(folder / "base")
    model = tiny.LlamaForCausalLM.from_pretrained(folder / "base")
    trainer = tiny.trainer(folder / "run", model, callbacks=[LoraCallback(r=4)], max_steps=2)
    trainer.train()
    trainer.model.save_pretrained(folder / "saved")
    return trainer


def find_base(trained: Any) -> Path:
    return Path(trained.args.output_dir).parent / "base"


def load_base(trained: Any) -> Any:
    return tiny.LlamaForCausalLM.from_pretrained(find_base(trained))


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Path:
    """A copy of what the trained model wrote."""
    return shutil.copytree(find_base(trained).parent / "saved", tmp_path / "saved")


def test_a_saved_folder_names_its_weights_and_is_read(saved: Path) -> None:
    known = hashlib.sha256((saved / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert json.loads((saved / "lineage.json").read_text())["weights"] == known
    assert read_lineage(saved)["losses"]["step"] == [1, 2]
    assert "weights" not in read_lineage(saved)


def test_a_file_from_before_the_weights_were_named_is_read(saved: Path) -> None:
    old = json.loads((saved / "lineage.json").read_text())
    del old["weights"]
    (saved / "lineage.json").write_text(json.dumps(old))
    assert read_lineage(saved)["losses"]["step"] == [1, 2]


def test_what_peft_saves_over_it_is_not_published_as_the_run_before(trained: Any, saved: Path, tmp_path: Path) -> None:
    other = peft.get_peft_model(
        load_base(trained), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    other.save_pretrained(saved)
    assert list_lineage(read_lineage(saved)) == OTHER
    with collect(saved, on_hub=False) as found:
        assert list_lineage(found.training.lineage) == OTHER
    assert collect_facts(str(saved)).lineage == OTHER


def test_a_file_in_a_folder_of_other_weights_or_of_none_is_not_read(saved: Path, tmp_path: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.rename(saved / "gone")
    assert list_lineage(read_lineage(saved)) == OTHER
    weights.symlink_to(saved / "gone")
    assert read_lineage(saved)["losses"]["step"] == [1, 2]


def test_a_prepared_model_without_a_training_takes_the_old_file_away(trained: Any, saved: Path) -> None:
    model = prepare_model(load_base(trained), r=4, seed=7)
    model.save_pretrained(saved)
    assert not (saved / "lineage.json").exists()


def test_the_same_weights_saved_again_keep_their_file(trained: Any, saved: Path) -> None:
    again = prepare_model(load_base(trained), adapter=saved)
    before = (saved / "adapter_model.safetensors").read_bytes()
    again.save_pretrained(saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert read_lineage(saved)["losses"]["step"] == [1, 2]


def test_an_adapter_that_was_not_trained_has_no_lineage_of_the_one_that_was(tmp_path: Path, trained: Any) -> None:
    model = prepare_model(load_base(trained), r=4)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = tiny.trainer(tmp_path / "run", model, callbacks=[LoraCallback()], max_steps=1)
    trainer.train()
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "saved")
    assert read_lineage(tmp_path / "saved")["losses"]["step"] == [1]
    assert not (tmp_path / "saved" / "other" / "lineage.json").exists()
    with collect(model, on_hub=False, adapter_name="other") as found:
        assert "another adapter than other" in list_lineage(found.training.lineage)[0][1]
    with collect(model, on_hub=False, adapter_name="default") as found:
        assert found.training.lineage["losses"]["step"] == [1]


# -- the parent --------------------------------------------------------------------------------


def read_parent(model: Any) -> Any:
    found = read_recorded(model)
    assert found is not None
    return found.get("parent", found["not_recorded"].get("parent"))


def train(tmp_path: Path, model: Any, **arguments: Any) -> Any:
    trainer = tiny.trainer(tmp_path / "out", model, callbacks=[LoraCallback(**arguments)], max_steps=1)
    trainer.train()
    return trainer


def test_an_adapter_that_prepare_model_loaded_is_the_parent(trained: Any, saved: Path, tmp_path: Path) -> None:
    weights = hashlib.sha256((saved / "adapter_model.safetensors").read_bytes()).hexdigest()
    trainer = train(tmp_path, prepare_model(load_base(trained), adapter=saved))
    assert read_parent(trainer.model) == {"sha256": weights}


def test_an_adapter_that_was_loaded_elsewhere_is_not_called_none(trained: Any, saved: Path, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(load_base(trained), saved, is_trainable=True)
    trainer = train(tmp_path, model)
    assert read_parent(trainer.model) == "the model came with an adapter that lora-plugins neither made nor loaded"


def test_a_second_training_in_one_process_says_so(trained: Any, tmp_path: Path) -> None:
    trainer = train(tmp_path, load_base(trained), r=4)
    assert read_parent(trainer.model) == "none"
    trainer.train()
    assert read_parent(trainer.model) == "the adapter was trained before in this process, and is in no file"


def test_a_reference_that_moves_is_resolved_once_and_its_range_is_not_in_the_name(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    first = push_adapter(trained, "org/name", version="1.2.0")
    model = prepare_model(load_base(trained), adapter="org/name>=1.2")
    other = train(tmp_path, load_base(trained), r=2)
    push_adapter(other, "org/name", version="1.3.0")
    parent = read_parent(train(tmp_path, model).model)
    assert (parent["name"], parent["version"]) == ("org/name", "1.2.0")
    assert parent["sha256"] == first.manifest.files["adapter_model.safetensors"].sha256
    assert parent["manifest"] == first.manifest.digest
