"""The parameter report: the same figures as line, table, JSON, HTML and tracker scalars."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from rich.console import Console

from lora_plugins import Int8PreparationCallback, LoraCallback, ParameterReportCallback, prepare_model
from lora_plugins.adapters.report import ParameterReport, make_report


def reported(trainer: Any) -> ParameterReport:
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ParameterReportCallback))
    assert callback.report is not None
    return callback.report


def test_report_of_a_quantized_run(tmp_path: Path) -> None:
    plain = sum(p.numel() for p in tiny.llama().parameters())
    trainer = tiny.trainer(
        tmp_path, callbacks=[LoraCallback(r=4, quantization="int8", compute_dtype="float32"), ParameterReportCallback()]
    )
    trainer.train()
    report = reported(trainer)
    lora = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert (report.trainable, report.total) == (lora, plain + lora)
    assert report.percent == pytest.approx(100 * lora / (plain + lora))
    assert (report.adapter, report.quantization) == ("default", "int8")
    quantized = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert report.quantized_share == pytest.approx(quantized / (plain + lora))
    assert report.bytes_by_dtype["int8"] == quantized
    assert report.bytes_before is not None
    assert report.bytes_before > report.bytes_after > 0
    assert report.bytes_trainable == 4 * lora
    rows = {row.name: (row.modules, row.shapes) for row in report.targets}
    assert rows == {"q_proj": (2, ["32 -> 32"]), "v_proj": (2, ["32 -> 16"])}
    assert sum(report.bare.values()) >= 10
    assert list(report.coverage.values()) == [[2, 2]]
    assert any("activation quantization" in note for note in report.notes)


def test_json_file_equals_the_report(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[ParameterReportCallback(), LoraCallback(r=4)])
    trainer.train()
    stored = json.loads((tmp_path / "parameter_report.json").read_text())
    assert stored == json.loads(json.dumps(reported(trainer).to_dict()))
    assert not list(tmp_path.glob("*.partial"))


def test_line_is_the_one_that_peft_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = prepare_model(tiny.llama(), r=4)
    model.print_trainable_parameters()
    assert make_report(model).line() == capsys.readouterr().out.strip()


def test_table_on_a_terminal_and_line_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(prepare_model(tiny.llama(), r=4, quantization="nf4"))
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, width=120).print(report)
    for text in ("q_proj", "v_proj", "trainable", "nf4", "no adapter"):
        assert text in screen.getvalue()
    report.print()
    assert capsys.readouterr().out.strip() == report.line()


def test_line_is_printed_once_however_many_callbacks_know_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for callbacks in ([ParameterReportCallback(), LoraCallback(r=4)], [ParameterReportCallback()]):
        model = tiny.llama() if len(callbacks) == 2 else prepare_model(tiny.llama(), r=4)
        tiny.trainer(tmp_path, model, callbacks, max_steps=1).train()
        assert capsys.readouterr().out.count("trainable params:") == 1


def test_html_for_notebooks_escapes_what_the_model_is_called() -> None:
    model = prepare_model(tiny.llama(), r=4)
    report = make_report(model)
    html = ParameterReport(**{**vars(report), "model": "<script>"})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert f"{report.trainable:,}" in html


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny.trainer(
        tmp_path, callbacks=[LoraCallback(r=4), ParameterReportCallback()], report_to=["tensorboard"]
    )
    trainer.train()
    events = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    assert events
    log = EventAccumulator(str(events[0]))
    log.Reload()
    values = {tag: log.Scalars(tag)[0].value for tag in log.Tags()["scalars"]}
    found = {tag.rpartition("parameters/")[2]: value for tag, value in values.items() if "parameters/" in tag}
    assert found["trainable"] == reported(trainer).trainable
    assert found["total"] == reported(trainer).total
    assert any(tag.endswith("memory/bytes_after_preparation") for tag in values)


def test_only_the_main_process_reports(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4), ParameterReportCallback()])
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ParameterReportCallback))
    trainer.state.is_world_process_zero = False
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.report is None
    assert not (tmp_path / "parameter_report.json").exists()


def test_model_prepared_elsewhere_is_reported_from_its_own_layers(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny.llama(), config)
    trainer = tiny.trainer(tmp_path, model, [ParameterReportCallback()])
    trainer.train()
    report = reported(trainer)
    assert {row.name: row.modules for row in report.targets} == {"q_proj": 2, "down_proj": 2}
    assert report.bytes_before is None
    under = tiny.trainer(tmp_path, model, [Int8PreparationCallback(), ParameterReportCallback()])
    under.train()
    assert reported(under).quantization == "int8"
    assert reported(under).trainable == report.trainable


def test_reference_adapter_is_listed_and_not_trainable() -> None:
    model = prepare_model(tiny.llama(), r=4)
    alone = make_report(model).trainable
    model.add_adapter("reference", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("default")
    report = make_report(model)
    assert report.frozen_adapters == ["reference"]
    assert report.trainable == alone


def test_bytes_count_each_storage_once() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    report = make_report(model)
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in [*model.parameters(), *model.buffers()]
    }
    assert report.bytes_after == sum(storages.values())
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
