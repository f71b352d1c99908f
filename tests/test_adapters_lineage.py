"""What a run was trained from is recorded while it trains, and lies beside every adapter that it writes."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetInfo, concatenate_datasets

from lora_plugins import LoraCallback
from lora_plugins.adapters.lineage.environment import describe_code
from lora_plugins.adapters.lineage.recording import describe_log
from lora_plugins.adapters.lineage.rows import describe_rows, hash_rows
from registry import list_lineage, push_adapter
from registry.publishing.source import collect

TEXTS = [f"secret training text {i}" for i in range(2500)]


def rows() -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "ids": [[i, i + 1] if i % 3 else None for i in range(len(TEXTS))]})


# -- data --------------------------------------------------------------------------------------


def test_the_hash_of_rows_does_not_depend_on_how_they_are_stored(tmp_path: Path) -> None:
    data = rows()
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    pieces = concatenate_datasets([data.select(range(0, 7)), data.select(range(7, len(data)))])
    turned = data.select(range(len(data) - 1, -1, -1)).select(range(len(data) - 1, -1, -1))
    same = [Dataset.load_from_disk(str(tmp_path / "saved")), pieces, turned, data.select_columns(["ids", "text"])]
    assert {hash_rows(other) for other in same} == {hash_rows(data)}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.select(range(len(data) - 1)),
        lambda data: data.select([1, 0, *range(2, len(data))]),
        lambda data: data.map(lambda row, i: {"text": row["text"] + " " * (i == 1700)}, with_indices=True),
        lambda data: data.rename_column("text", "texts"),
        lambda data: data.remove_columns("ids"),
    ],
    ids=["a row less", "two rows exchanged", "a space more", "another name", "a column less"],
)
def test_the_hash_of_other_rows_is_another(change: Any) -> None:
    assert hash_rows(change(rows())) != hash_rows(rows())


def test_a_data_set_of_the_hub_is_named_with_its_revision() -> None:
    """As datasets 5.2 records it; also after rows were mapped."""
    checksums = {f"hf://datasets/org/data@{'a' * 40}/{part}.parquet": {"num_bytes": 1} for part in ("x", "y")}
    data = Dataset.from_dict({"text": ["a", "b"]}, info=DatasetInfo(download_checksums=checksums))
    for one in (data, data.map(lambda row: {"n": 1})):
        facts, missing = describe_rows(one)
        assert (facts["id"], facts["revision"]) == ("org/data", "a" * 40)
        assert missing == {}


@pytest.mark.parametrize(
    "checksums", [{"/home/jane/train.jsonl": {}}, {f"hf://datasets/a/b@{'a' * 40}/x": {}, "https://x/y": {}}, {}]
)
def test_a_data_set_of_other_files_has_no_id(checksums: dict[str, Any]) -> None:
    facts, missing = describe_rows(Dataset.from_dict({"a": [1]}, info=DatasetInfo(download_checksums=checksums)))
    assert "id" not in facts
    assert missing["id"] == "the data were not loaded from the Hub"


def test_streamed_rows_and_own_classes_are_said_not_to_be_recorded() -> None:
    facts, missing = describe_rows(rows().to_iterable_dataset())
    assert (facts.get("rows"), missing["rows"], missing["sha256"]) == (
        None,
        "the data are streamed",
        "the data are streamed",
    )
    facts, missing = describe_rows(torch.utils.data.TensorDataset(torch.zeros(3)))
    assert facts == {"rows": 3}
    assert "TensorDataset" in missing["sha256"]
    assert "TensorDataset" in missing["columns"]


def test_the_first_losses_are_all_recorded_and_the_rest_is_thinned() -> None:
    log = [{"step": i, "loss": float(i), "grad_norm": 1.0} for i in range(1, 5001)] + [{"step": 5000, "eval_loss": 1.0}]
    found = describe_log(log)
    assert found["step"][:200] == list(range(1, 201))
    assert found["step"][-1] == 5000
    assert len(found["step"]) == len(found["loss"]) == len(found["grad_norm"]) <= 400
    assert describe_log([]) == {}


# -- code --------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *settings, "-C", str(folder), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_of_the_script_and_whether_it_was_changed(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    script = tmp_path / "train.py"
    script.write_text("1")
    assert describe_code(script, "the script") == "the file of the script is not in a git repository here"
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert describe_code(script, "the script") == {"of": "the script", "commit": commit, "dirty": False}
    (tmp_path / "other.txt").write_text("not tracked")
    assert describe_code(script, "the script") == {"of": "the script", "commit": commit, "dirty": False}
    script.write_text("2")
    assert describe_code(script, "the script") == {"of": "the script", "commit": commit, "dirty": True}


def test_a_repository_runs_no_program_of_its_settings(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("1")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-qm", "x")
    git(tmp_path, "config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; true")
    assert isinstance(describe_code(tmp_path / "train.py", "the script"), dict)
    assert not (tmp_path / "ran").exists()


def test_without_git_the_code_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "train.py").write_text("1")
    assert "not in a git repository" in str(describe_code(tmp_path / "train.py", "the script"))


# -- a training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lineage")
    tiny.llama().save_pretrained(folder / "base")
    model = tiny.LlamaForCausalLM.from_pretrained(folder / "base")
    trainer = tiny.trainer(
        folder / "out", model, callbacks=[LoraCallback(r=4)], data=tiny.rows(), save_strategy="steps", save_steps=2
    )
    trainer.train()
    return trainer


def test_every_checkpoint_has_what_it_was_trained_from(trained: Any) -> None:
    out = Path(trained.args.output_dir)
    for step in (2, 4):
        found = json.loads((out / f"checkpoint-{step}" / "lineage.json").read_text())
        assert found["dataset"]["train"]["sha256"] == hash_rows(tiny.rows())
        assert (found["dataset"]["train"]["rows"], found["dataset"]["train"]["columns"]) == (
            32,
            ["input_ids", "labels"],
        )
        assert found["seed"] == 7
        assert found["libraries"]["torch"] == importlib.metadata.version("torch")
        assert found["losses"]["step"] == list(range(1, step + 1))
        logged = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
        assert found["losses"]["loss"] == logged[:step]
        assert (found["parent"], found["tracker"]) == ("none", "none")
        assert found["not_recorded"]["recipe"] == "the Trainer was made by a script, not by lora-plugins train"


@pytest.mark.parametrize("way", ["trainer", "checkpoint", "saved"])
def test_it_is_published_from_a_trainer_a_checkpoint_and_a_saved_folder(trained: Any, way: str, tmp_path: Path) -> None:
    source: Any = trained
    if way == "checkpoint":
        source = Path(trained.args.output_dir) / "checkpoint-4"
    elif way == "saved":
        trained.model.save_pretrained(tmp_path / "saved")
        source = tmp_path / "saved"
    published = push_adapter(source, "org/name", version="1.0.0", hub=tmp_path / "registry")
    assert published.manifest.lineage["losses"]["step"] == [1, 2, 3, 4]
    assert published.manifest.lineage["dataset"]["train"]["rows"] == 32
    card = next((tmp_path / "registry").rglob("README.md")).read_text()
    assert "## Lineage" in card
    assert "not recorded: the Trainer was made by a script" in card


def test_neither_text_nor_names_of_the_machine_leave_it(trained: Any, tmp_path: Path) -> None:
    push_adapter(trained, "org/name", version="1.0.0", hub=tmp_path / "registry")
    written = [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md"), *Path(trained.args.output_dir).rglob("lineage.json")]
    text = "\n".join(path.read_text() for path in written)
    assert len(written) > 4
    for private in (str(tmp_path.parent), trained.args.output_dir, str(Path.home()), os.getcwd()):
        assert private == "/" or private not in text, private
    words = {word.strip('",:') for path in written for word in path.read_text().split()}
    assert words.isdisjoint({socket.gethostname(), getpass.getuser()} - {"root", "runner", "user"})
    assert str(trained.train_dataset[0]["input_ids"][:6]).strip("[]") not in text.replace("\n", " ")


def test_a_model_trained_without_the_callback_says_so(tmp_path: Path) -> None:
    from adapters import adapted

    tiny.llama().save_pretrained(tmp_path / "base")
    model = adapted(tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with collect(model, on_hub=False) as found:
        rows = list_lineage(found.training.lineage)
    assert rows == [("lineage", "not recorded: the model was trained without LoraCallback")]


def test_a_resumed_run_says_where_and_what_was_other_from_there(trained: Any, tmp_path: Path) -> None:
    checkpoint = Path(trained.args.output_dir) / "checkpoint-2"
    found = json.loads((checkpoint / "lineage.json").read_text())
    found["libraries"]["torch"] = "2.0.0"
    (checkpoint / "lineage.json").write_text(json.dumps(found))
    model = tiny.LlamaForCausalLM.from_pretrained(Path(trained.args.output_dir).parent / "base")
    again = tiny.trainer(
        tmp_path, model, callbacks=[LoraCallback(r=4)], data=tiny.rows(), save_strategy="steps", save_steps=4
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    recorded = json.loads((tmp_path / "checkpoint-4" / "lineage.json").read_text())
    version = importlib.metadata.version("torch")
    assert recorded["resumed"] == [{"step": 2, "changed": {"libraries.torch": ["2.0.0", version]}}]
    assert recorded["losses"]["step"] == [1, 2, 3, 4]
    assert ("resumed at step 2", f"libraries.torch 2.0.0, {version}") in list_lineage(recorded)


def test_the_parent_of_a_continued_adapter_is_recorded(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    parent = push_adapter(trained, "org/name", version="1.0.0")
    base = Path(trained.args.output_dir).parent / "base"
    for adapter, name in (("org/name@1.0.0", "org/name"), (Path(trained.args.output_dir) / "checkpoint-4", None)):
        model = tiny.LlamaForCausalLM.from_pretrained(base)
        again = tiny.trainer(tmp_path / "out", model, callbacks=[LoraCallback(adapter=adapter)], data=tiny.rows())
        again.train()
        with collect(again, on_hub=False) as found:
            recorded = found.training.lineage["parent"]
        assert recorded.get("name") == name
        assert recorded["sha256"] == parent.manifest.files["adapter_model.safetensors"].sha256 or name is None
        if name:
            assert (recorded["version"], recorded["manifest"]) == ("1.0.0", parent.manifest.digest)


def test_run_ids_of_trackers_are_recorded(tmp_path: Path, offline_wandb: Any, local_mlflow: Any) -> None:
    trainer = tiny.trainer(
        tmp_path / "out", callbacks=[LoraCallback(r=4)], report_to=["wandb", "mlflow", "tensorboard"]
    )
    trainer.train()
    known = {"wandb": offline_wandb.run.id, "mlflow": local_mlflow.last_active_run().info.run_id}
    offline_wandb.finish()
    with collect(trainer, on_hub=False) as found:
        recorded = found.training.lineage["tracker"]
    assert {entry["name"]: entry.get("id") for entry in recorded} == {**known, "tensorboard": None}
    assert all("url" not in entry for entry in recorded), "neither has an address that others can open"
