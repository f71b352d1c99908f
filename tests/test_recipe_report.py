"""The report page: the printed figures, everything foreign as text, nothing asked of a network."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import twin
from adapters import saved
from browser import AXE, NO_AXE, find_violations, open_browser

from lora_plugins import LoraCallback, ParameterReportCallback
from lora_plugins.commands.cli import main
from lora_plugins.errors import ArgumentsError, ReportError
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.report.collect import RunFacts, _make_log, collect_facts, collect_run
from lora_plugins.recipe.report.page import render_page, write_page
from lora_plugins.recipe.report.samples import Samples
from lora_plugins.recipe.run import TrainingRun, run
from registry import compare_layers, push_adapter

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
    "<a href='https://evil.invalid'>x</a>",
    "<meta http-equiv=refresh content='0;url=https://evil.invalid'>",
    "a\u202eb\u200bc\x1b[2J\x00",
    "<!-- --> ]]> &lt;b&gt;",
    "1;background:url(https://evil.invalid/x.png)",
]


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, texts by the figure that they show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, tuple[float, str]] = {}
        self.layers: dict[str, float] = {}
        self.losses: list[tuple[str, str]] = []
        self.text = ""
        self._figure = ""
        self.feed(text)
        row = r'<tr><th scope="row" class="n">(\d+)</th><td class="n">([^<]*)</td>'
        self.losses = re.findall(row, text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._figure = given.get("data-figure") or ""
        if self._figure:
            self.figures[self._figure] = (float(given["data-value"] or "nan"), "")
        if given.get("data-layer") is not None:
            self.layers[str(given["data-layer"])] = float(given["data-value"] or "nan")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._figure and data.strip():
            self.figures[self._figure] = (self.figures[self._figure][0], data.strip())
            self._figure = ""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer made by hand that has trained, evaluated before and after, and saved."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        return train(folder)


def train(folder: Path) -> Any:
    tiny.llama().save_pretrained(folder / "base")
    trainer = tiny.trainer(
        folder / "run",
        tiny.LlamaForCausalLM.from_pretrained(folder / "base"),
        callbacks=[LoraCallback(r=4, quantization="int8"), ParameterReportCallback()],
        data=tiny.rows(),
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=5)},
        report_to=["tensorboard"],
        eval_strategy="steps",
        eval_steps=4,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    return trainer


def test_the_figures_are_the_printed_ones_and_those_of_the_log(ran: Any, tmp_path: Path) -> None:
    folder = Path(ran.args.output_dir)
    page = Page(write_page(collect_facts(str(folder)), tmp_path / "page.html").read_text())
    (report,) = (c.report for c in ran.callback_handler.callbacks if isinstance(c, ParameterReportCallback))
    printed = re.fullmatch(r"trainable params: (.+) \|\| all params: (.+) \|\| trainable%: (\S+).*", report.line())
    assert printed is not None
    shown = [page.figures[name][1] for name in ("trainable", "total", "percent")]
    assert shown == list(printed.groups())
    assert page.figures["bytes_after"] == (report.bytes_after, f"{report.bytes_after:,}")
    losses = [entry["loss"] for entry in ran.state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in ran.state.log_history if "eval_loss" in entry]
    assert page.figures["loss"][0] == losses[-1]
    assert page.figures["eval_loss_first"][0] == held_out[0]
    assert page.figures["eval_loss"][0] == held_out[-1]
    for loss in losses:
        assert f"{loss:.6g}" in page.text
    place = folder / "checkpoint-4"
    assert page.layers == {change.name: change.before for change in compare_layers(place, place)}
    assert len(page.layers) == 4
    assert "before training" in page.text
    for name in ("model-replaced", "non-finite-loss", "broken-checkpoint"):
        assert f"{name} (switched on)" in page.text
    for words in ("Bytes of the model", "Loss"):
        assert words in page.text
    for words in ("nats", "while training", "✓"):
        assert words not in page.text


def test_the_figures_are_those_that_the_tracker_has(ran: Any) -> None:
    """Read back from TensorBoard's file and from the HTML."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(ran.args.output_dir)
    log = EventAccumulator(str(folder.parent / "events"))
    log.Reload()
    sent = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    page = Page(render_page(collect_run(folder)))
    values = {name: value for name, (value, _) in page.figures.items()}
    assert values["trainable"] == sent["train/parameters/trainable"][-1][1]
    assert values["total"] == sent["train/parameters/total"][-1][1]
    assert values["bytes_after"] == sent["train/memory/bytes_after_preparation"][-1][1]
    assert values["percent"] == pytest.approx(sent["train/parameters/trainable_percent"][-1][1])
    assert values["loss"] == pytest.approx(sent["train/loss"][-1][1])
    assert values["eval_loss"] == pytest.approx(sent["eval/loss"][-1][1])
    assert values["eval_loss_first"] == pytest.approx(sent["eval/loss"][0][1])
    shown = {int(step): float(loss) for step, loss in page.losses if loss}
    assert shown == pytest.approx(dict(sent["train/loss"]), rel=1e-5)
    assert len(shown) == 4


def test_the_table_says_why_a_module_has_no_adapter(ran: Any) -> None:
    text = Page(render_page(collect_run(Path(ran.args.output_dir)))).text
    for words in (
        "model.layers.*.mlp.up_proj2not a target of the registered architecture 'llama'",
        "model.norm1of the class LlamaRMSNorm, which takes no adapter",
        "lm_head1the output layer, which is taken only where it is named",
    ):
        assert words in text


def test_a_report_of_a_former_release_still_has_its_table(ran: Any, tmp_path: Path) -> None:
    shutil.copytree(ran.args.output_dir, tmp_path / "run")
    file = tmp_path / "run" / "parameter_report.json"
    told = json.loads(file.read_text())
    del told["left_out"]
    file.write_text(json.dumps(told))
    assert "the reason is not recorded" in Page(render_page(collect_run(tmp_path / "run"))).text


def test_samples_are_in_the_page_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the adapter is the same bit by bit."""
    monkeypatch.chdir(tmp_path)
    twin.make_base(tmp_path / "base", steps=2)
    twin.write_jsonl(tmp_path / "train.jsonl", twin.dialogues(24, seed=1))
    rows = twin.dialogues(4, seed=2)
    twin.write_jsonl(tmp_path / "test.jsonl", rows)
    words = ["--model", "base", "--dataset", "train.jsonl", "--eval_dataset", "test.jsonl", "--max_steps", "2",
             "--chunk-length", "128", "--merge", "none", "--report_to", "none"]  # fmt: skip
    assert run([*words, "--output_dir", "with", "--samples", "2"]) == 0
    assert run([*words, "--output_dir", "without"]) == 0
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    page = Page((tmp_path / "with" / "report.html").read_text())
    first = rows[0]["dialogue"].split("\n")[0]
    assert first in page.text
    assert "held out, row 2" in page.text
    assert "row 3" not in page.text
    assert "has generated no text" in Page((tmp_path / "without" / "report.html").read_text()).text
    for file in (tmp_path / "with").rglob("*"):
        if file.is_file() and file.name != "report.html":
            assert first.encode() not in file.read_bytes(), file
            assert json.dumps(first).encode() not in file.read_bytes(), file


def test_samples_that_a_model_cannot_give_end_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    one: Any = object.__new__(TrainingRun)
    one.is_main, one._samples = True, (Samples(["x"], [[1]], SimpleNamespace()), ["before"])  # type: ignore[arg-type]
    assert (
        one._ask_after(SimpleNamespace(model=SimpleNamespace(training=False, eval=int, train=bool, config=None))) == []
    )
    assert capsys.readouterr().out.startswith("No samples: the model generates no text here (")


def test_a_number_of_samples_that_is_not_valid_is_refused() -> None:
    for count in ("-1", "101"):
        with pytest.raises(ArgumentsError, match=f"--samples must be 0 to 100, not {count}"):
            parse(["--model", "x", "--dataset", "y", "--output_dir", "z", "--samples", count])


def test_no_page_with_samples_lies_where_the_trainer_uploads_from(tmp_path: Path) -> None:
    """``Trainer.push_to_hub`` uploads its output folder, pages of earlier runs among the files."""
    out, words = tmp_path / "out", ["--model", "x", "--dataset", "y", "--output_dir", str(tmp_path / "out")]
    out.mkdir()
    page = out / "report.html"
    page.write_text("an earlier run's samples")
    pushing = [*words, "--push_to_hub", "true"]
    with pytest.raises(ArgumentsError, match=r"--samples .* --push_to_hub uploads .* --report_folder"):
        TrainingRun(*parse([*pushing, "--samples", "2"])).run()
    for more in (["--report_folder", str(out / "nested")], ["--report_folder", str(tmp_path / "link")]):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(out)
        with pytest.raises(ArgumentsError, match="--push_to_hub uploads"):
            TrainingRun(*parse([*pushing, "--samples", "2", *more])).run()
    TrainingRun(*parse([*words, "--samples", "2"]))._keep_page_here()
    assert page.exists()
    for more in (["--samples", "2", "--report_folder", str(tmp_path / "else")], []):
        page.write_text("an earlier run's samples")
        TrainingRun(*parse([*pushing, *more]))._keep_page_here()
        assert not page.exists()


def test_a_release_has_a_page_too(ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    done = push_adapter(ran, "org/name", version="1.0.0")
    with pytest.raises(SystemExit) as ended:
        main(["report", "org/name@1.0.0", "--output", "page.html"])
    assert not ended.value.code
    page = Page(Path("page.html").read_text())
    assert page.figures["eval_loss"][0] == done.manifest.metrics["eval_loss"]
    assert done.manifest.digest in page.text
    assert "not recorded: there is no parameter report" in page.text
    assert "32 rows; columns input_ids, labels" in page.text
    assert "nothing was evaluated" not in page.text
    assert "gradient norm" in page.text


def test_the_page_asks_no_network_and_has_no_script(ran: Any) -> None:
    text = render_page(collect_run(Path(ran.args.output_dir)))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "img", "form", "base", "audio"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "action", "srcset", "xlink:href"):
            assert attributes.get(name, "data:,") == "data:,"
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def hostile_facts() -> RunFacts:
    """Every text that can come from others is an attack."""
    nasty = HOSTILE
    pairs = [(text, text) for text in nasty]
    return RunFacts(
        title=nasty[0],
        facts=pairs,
        log=[{"step": 1, "loss": 2.0, "learning_rate": 1e-4}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}],
        metrics=dict.fromkeys(nasty, 1.0),
        report={
            "model": nasty[1], "trainable": 1, "total": 10, "percent": 10.0, "quantization": nasty[4],
            "quantized_share": 0.5, "bytes_by_dtype": dict.fromkeys(nasty, 5), "bytes_quantization_state": 3,
            "bytes_before": None, "bytes_after": 8, "source": nasty[2], "notes": nasty,
            "targets": [{"name": text, "modules": 1, "shapes": [text]} for text in nasty],
            "left_out": [(text, 1, text) for text in nasty], "coverage": {text: [1, 2] for text in nasty},
        },
        layers=[*((f"h.{i}.{text}", 1.0 + i) for i, text in enumerate(nasty)), ("h.99.x", math.inf)],
        lineage=pairs,
        checks={"on": nasty, "switched off": nasty},
        samples=[{"title": text, "prompt": text, "before": text, "after": text} for text in nasty],
    )  # fmt: skip


def test_what_others_wrote_is_shown_as_text() -> None:
    plain = Page(render_page(collect_nothing()))
    page = Page(render_page(hostile_facts()))
    allowed = {tag for tag, _ in plain.tags} | {
        "a", "svg", "title", "desc", "line", "text", "polyline", "circle", "rect", "figure", "figcaption", "table",
        "caption",
        "thead", "tbody", "tr", "th", "td", "details", "summary", "ul", "li", "h3", "pre", "span", "div", "dl", "dt",
        "dd",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed - {"a"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "href" not in attributes or attributes["href"] == "data:,"
        assert "style" not in attributes
    for text in HOSTILE:
        shown = (
            text.replace("\u202e", "\ufffd")
            .replace("\u200b", "\ufffd")
            .replace("\x1b", "\ufffd")
            .replace("\x00", "\ufffd")
        )
        assert shown in page.text
    assert not re.search("[\u202e\u200b\x1b\x00]", render_page(hostile_facts()))


def collect_nothing() -> RunFacts:
    return RunFacts(title="empty")


def test_a_page_of_nothing_says_what_is_not_recorded() -> None:
    text = Page(render_page(collect_nothing())).text
    assert text.count("not recorded") >= 7
    assert "Lineage and environment not recorded: there is no lineage.json" in " ".join(text.split())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "parameter_report.json").write_text("[1]"),
        lambda folder: (folder / "parameter_report.json").write_text("{"),
        lambda folder: (folder / "parameter_report.json").write_text('{"trainable": "x", "targets": []}'),
        lambda folder: (folder / "metrics.json").write_text('{"log": [1, {"step": "x", "loss": "y"}], "data": [1]}'),
        lambda folder: (folder / "checkpoint-4" / "trainer_state.json").unlink(),
        lambda folder: (folder / "checkpoint-4" / "lineage.json").write_text('{"losses": {"step": 1}, "checks": 3}'),
        lambda folder: shutil.rmtree(folder / "checkpoint-4"),
    ],
    ids=["a list", "cut off", "wrong types", "wrong log", "no state", "wrong lineage", "an earlier checkpoint"],
)
def test_a_run_with_broken_files_still_has_a_page(ran: Any, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(ran.args.output_dir, tmp_path / "run")
    damage(tmp_path / "run")
    assert "<h1>run</h1>" in render_page(collect_facts(str(tmp_path / "run")))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no adapter_model\.safetensors"):
        collect_facts(str(tmp_path))
    with pytest.raises(ReportError, match="cannot be written"):
        write_page(collect_nothing(), Path(os.devnull) / "page.html")


@pytest.mark.parametrize("name", [".", "..", "pages", "pages/"])
def test_a_page_is_not_written_over_a_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReportError, match=r"is a folder: give the page's file, such as .*report\.html"):
        write_page(collect_nothing(), Path(name))
    assert [path.name for path in tmp_path.rglob("*")] == ["pages"]


def test_what_cannot_be_shown_is_an_error_that_train_and_the_demo_survive(tmp_path: Path) -> None:
    facts = RunFacts(title="x", report={"trainable": 1, "total": 2})
    with pytest.raises(ReportError, match="cannot be made of what the run holds"):
        write_page(facts, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_demo_publishes_where_its_page_cannot_be_written(tmp_path: Path) -> None:
    from lora_plugins.commands.demo.run import Demo

    said: list[str] = []
    demo: Any = object.__new__(Demo)
    demo.options = SimpleNamespace(output=tmp_path, seed=1)
    demo.result = SimpleNamespace(samples=[], loss_float=1.0, loss_before=1.0, loss_after=1.0)
    demo.say = said.append
    demo._write_page()
    assert said
    assert said[0].startswith("No report page: ")


def test_log_entries_without_a_step_and_with_odd_values_are_shown() -> None:
    log = [{"loss": 1.5}, {"step": 2, "loss": None}, {"step": "x", "eval_loss": [1]}, {"step": 3, "loss": 2.0}]
    text = Page(render_page(RunFacts(title="odd", log=log))).text
    assert "1.5" in text
    assert "[1]" in text


def test_losses_of_several_held_out_sets_are_shown_by_name() -> None:
    log = [
        {"step": 0, "eval_code_loss": 3.0, "eval_a_b_loss": 4.0},
        {"step": 1, "loss": 2.5},
        {"step": 2, "eval_code_loss": 1.0, "eval_a_b_loss": 2.0, "eval_code_runtime": 7.0},
    ]
    page = Page(render_page(RunFacts(title="several", log=log)))
    assert page.figures["eval_code_loss_first"][0] == 3.0
    assert page.figures["eval_a_b_loss_last"][0] == 2.0
    for words in ("held-out loss, code, before training", "held out, a_b", "held-out loss, a_b, last, at step 2"):
        assert words in page.text
    assert "nothing was evaluated" not in page.text


def test_losses_of_a_release_are_drawn_at_their_steps() -> None:
    lineage = {"losses": {"step": [1, 2, 3], "loss": [None, 4.0, 3.0], "grad_norm": [None, 0.5, 0.25]}}
    assert _make_log(lineage) == [
        {"step": 1},
        {"step": 2, "loss": 4.0, "grad_norm": 0.5},
        {"step": 3, "loss": 3.0, "grad_norm": 0.25},
    ]
    assert _make_log({"losses": {"step": [1, 2], "loss": [4.0]}}) == []
    assert _make_log({"losses": {"step": [1, 2], "loss": [4.0, 3.0], "grad_norm": [1.0]}}) == []


def test_an_adapter_of_others_has_a_page(tmp_path: Path) -> None:
    """Saved by PEFT alone: its layers are measured, the rest is said not to be recorded."""
    tiny.llama().save_pretrained(tmp_path / "base")
    saved(tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    page = Page(render_page(collect_facts(str(tmp_path / "adapter"))))
    assert page.layers
    assert "the folder holds no lineage.json" in page.text


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "hostile", "empty"])
def test_the_page_in_a_browser(ran: Any, tmp_path: Path, kind: str) -> None:
    """Wide and at phone width, light and dark: it fits, asks nothing, says nothing on the console, runs nothing."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    made = {"run": lambda: collect_run(Path(ran.args.output_dir)), "hostile": hostile_facts, "empty": collect_nothing}
    page = write_page(made[kind](), tmp_path / "page.html")
    with open_browser() as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.open(page, width=width, dark=dark)
                browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
                browser.take_picture(folder / f"{kind}-{'dark' if dark else 'light'}-{width}.png")
                assert browser.run("document.documentElement.scrollWidth") <= width
                if kind == "run":
                    # Why a module has no adapter is seen without scrolling the table.
                    assert (
                        browser.run("document.querySelector('.reasons .words').getBoundingClientRect().x") < width * 0.7
                    )
                assert browser.run("document.querySelectorAll('script, img, a, iframe').length") == 0
                background = browser.run("getComputedStyle(document.body).backgroundColor")
                assert background == ("rgb(15, 18, 22)" if dark else "rgb(246, 247, 249)")
                found = find_violations(browser)
                assert found == {}
        asked = {url for url in browser.requests if not url.startswith(("data:", "about:"))}
        assert asked == {page.as_uri()}
        assert browser.console == []
    if not AXE:
        pytest.skip(NO_AXE)
