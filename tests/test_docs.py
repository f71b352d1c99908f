"""The documentation: its code runs, every hook and command is described as it is."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import twin
from rich.console import Console

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: A fenced block at the beginning of a line: its info string and its text.
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

# What can not run says so: ```python {.norun}. What goes on from the block before: ```python {.continue}.
NO_RUN, CONTINUE = ".norun", ".continue"

# Pages whose blocks are tested elsewhere: as the files that they are, or below with a small model.
OWN_TESTS = {"registry-testing.md", "gpu-tutorial.md"}


#: Output that is shown directly under a block.
OUTPUT = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code, and what the page says that it prints: empty if it says nothing."""

    code: str
    output: str


def programs(page: Path) -> dict[str, list[Block]]:
    """The programs of a page by name: each a block that can run, and the blocks that continue it."""
    found: dict[str, list[Block]] = {}
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, _, marks = match["info"].partition(" ")
        if language != "python" or NO_RUN in marks:
            continue
        if CONTINUE not in marks:
            name = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
            found[name] = []
        output = OUTPUT.match(text, match.end())
        found[name].append(Block(match["text"], output[1] if output else ""))
    return found


def is_printed(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, up to line breaks; ``…`` stands for anything."""
    if not shown.strip():
        return True
    pattern = ".*?".join(map(re.escape, re.split(r" ?… ?", " ".join(shown.split()))))
    return re.search(rf"(?<!\S){pattern}(?!\S)", " ".join(printed.split())) is not None


PROGRAMS = [
    pytest.param(program, id=name)
    for page in PAGES
    if page.name not in OWN_TESTS
    for name, program in programs(page).items()
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_blocks_run_and_print_what_is_shown(
    program: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    namespace = {"__name__": "documentation"}
    for number, block in enumerate(program):
        exec(compile(block.code, f"block {number}", "exec"), namespace)
        printed = "".join(capsys.readouterr())
        assert is_printed(block.output, printed), f"{block.output}\n-- is not in --\n{printed}"


def test_output_of_another_value_is_found() -> None:
    assert is_printed("a …\nb  1", "x\na 2\nb 1\n")
    assert not is_printed("a …\nb 2", "a 2\nb 1\n")


def test_the_tutorial_for_a_gpu_trains_a_small_model_and_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dialogues"
    folder.mkdir()
    twin.make_base(tmp_path / "base", steps=1)
    twin.write_jsonl(folder / "train.jsonl", twin.dialogues(64, seed=1))
    twin.write_jsonl(folder / "validation.jsonl", twin.dialogues(8, seed=2))
    for name, value in {"MODEL": tmp_path / "base", "DATA": folder, "STEPS": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (blocks,) = programs(ROOT / "docs" / "gpu-tutorial.md").values()
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks:
        exec(compile(block.code, "gpu-tutorial.md", "exec"), namespace)
    assert is_printed(blocks[-1].output, capsys.readouterr().out)
    assert namespace["trainer"].state.global_step == 4

    monkeypatch.setenv("STEPS", "8")
    exec(compile(blocks[0].code, "gpu-tutorial.md", "exec"), namespace)
    state = namespace["trainer"].state
    assert state.global_step == 8
    assert [entry["step"] for entry in state.log_history if "eval_loss" in entry] == list(range(1, 9))


def read_options(words: list[str]) -> dict[str, Any]:
    """Return the options of a command as keyword arguments; one without a value is a switch."""
    found: dict[str, Any] = {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = value.startswith("--") or (int(value) if value.isdigit() else value)
    return found


def words_of(line: str) -> str:
    return " ".join(re.sub("[^\\w.,%:\\- ]", " ", line).split())


def test_plans_of_the_tutorial_are_what_the_command_prints() -> None:
    """The output that is shown, the totals of its table, and the line of the report; none depends on this machine."""
    from lora_plugins import plan

    page = (ROOT / "docs" / "gpu-tutorial.md").read_text(encoding="utf-8")
    found = re.search(r"^\$ lora-plugins plan (.+?[^\\])\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    model, *words = shlex.split(found[1])
    plans = [plan(ROOT / model, **{**read_options(words), "batch_size": size}) for size in (4, 8)]
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None, force_jupyter=False).print(plans[0])
    printed = {words_of(line) for line in stream.getvalue().splitlines()}
    shown = {words_of(line) for line in found[2].splitlines()}
    assert len(shown) > 15
    assert shown - printed == set()

    table = dict(re.findall(r"^\| (\w+) \| (.* GiB .*) \|$", page, re.MULTILINE))
    sizes: dict[str, list[str]] = {name: [] for name in ("float", "int8", "nf4")}
    for row in [row for planned in plans for row in planned.rows if row.checkpointing]:
        if (row.quantization or "float") in sizes:
            sizes[row.quantization or "float"].append(f"{row.memory.total / 2**30:.2f} GiB")
    assert table == {name: " | ".join(size) for name, size in sizes.items()}

    planned = plans[0]
    share = planned.chosen.quantized_share * (planned.total - planned.trainable) / planned.total
    line = f"trainable params: {planned.trainable:,} || all params: {planned.total:,} || trainable%: "
    assert is_printed(f"{line}{planned.percent:.4f} || nf4: {share:.1%} of the weights", page)


def test_programs_were_found() -> None:
    """A change of the fences must not leave nothing to run."""
    names = {str(parameter.id).partition(":")[0] for parameter in PROGRAMS}
    assert {"quickstart.md", "trainer.md", "plugins.md", "troubleshooting.md", "hooks.md"} <= names
    compared = {
        str(parameter.id).partition(":")[0]
        for parameter in PROGRAMS
        for block in parameter.values[0]  # type: ignore[union-attr]
        if block.output.strip()
    }
    assert {"quickstart.md", "trainer.md", "train.md", "loading.md"} <= compared


def test_shown_output_is_compared_by_whole_words() -> None:
    printed = "trainable params: 11 || all params: 200\nloss 0.25"
    assert is_printed("trainable params: 11 || … 200", printed)
    assert not is_printed("trainable params: 1", printed)
    assert not is_printed("params: 11 || all params: 20", printed)


def test_every_python_block_is_marked_or_runs() -> None:
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            language, _, marks = match["info"].partition(" ")
            known = marks in ("", f"{{{NO_RUN}}}", f"{{{CONTINUE}}}") or language != "python"
            assert known, f"{page.name}: unknown marks {match['info']!r}"


#: Characters of code in a line in a window of 1,280 pixels; the second on a page without a table of contents.
COLUMNS, WIDE = 80, 110


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_fits_a_window_of_1280_pixels(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    width = WIDE if "hide: [toc]" in text else COLUMNS
    # Lists that a program reads have a language of their own.
    blocks = [match["text"] for match in FENCE.finditer(text) if match["info"] != "peers"]
    assert [line for block in blocks for line in block.splitlines() if len(line) > width] == []


def tool(name: str) -> ModuleType:
    """Load one of the programs in tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_hook_is_documented_with_its_signature() -> None:
    reference = tool("hook_reference")
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")

    kinds = ("architectures", "quantizers", "formats", "commands", "checks", "servers")
    assert reference.hooks() == [f"register_{kind}" for kind in kinds]
    headings = re.findall(r"^## `(.+)` \{ #(\w+) \}$", page, re.MULTILINE)
    assert headings == [(reference.signature(name), name) for name in reference.hooks()]


@pytest.mark.parametrize("name", ["hook_reference", "command_reference", "format_reference"])
def test_generated_pages_are_up_to_date(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = tool(name)
    monkeypatch.setattr("sys.argv", [name, "--check"])
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERMINAL_WIDTH", "50")
    assert reference.main() == 0

    stale = tmp_path / "page.md"
    text = reference.PAGE.read_text(encoding="utf-8")
    stale.write_text(text.replace("plugin", "plug-in").replace("AWQ", "awq"), encoding="utf-8")
    monkeypatch.setattr(reference, "PAGE", stale)
    assert reference.main() == 1
    assert "run `make docs`" in capsys.readouterr().err


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f": {page.name}" not in navigation] == []


def test_the_schema_in_the_documentation_is_the_one_in_the_package() -> None:
    name = "adapter_manifest.schema.json"
    assert (ROOT / "docs" / name).read_bytes() == (ROOT / "registry" / name).read_bytes()


def test_tests_that_the_page_of_problems_names_exist() -> None:
    text = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8")
    known = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named - known == set()
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert rows == [*map(str, range(1, 26)), *map(str, range(1, 21)), *map(str, range(1, 21))]


def test_diagrams_are_up_to_date_and_their_text_stays_inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diagrams = tool("diagrams")
    monkeypatch.setattr("sys.argv", ["diagrams", "--check"])
    assert diagrams.main() == 0
    for rows in (diagrams.EVENTS, diagrams.RELEASE):
        words = [word for row in rows for word in row.name.split()]
        assert max(map(len, words)) <= (diagrams.LEFT - 16) * 0.125, "a word that is longer would leave its box"

    (tmp_path / "events.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "release.svg").write_text(diagrams.DIAGRAMS["release.svg"], encoding="utf-8")
    monkeypatch.setattr(diagrams, "DOCS", tmp_path)
    assert diagrams.main() == 1
    assert capsys.readouterr().err == "docs/events.svg is not up to date: run `make docs`\n"
