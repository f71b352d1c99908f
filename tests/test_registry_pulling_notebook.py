"""What a notebook shows of plans, published releases and pulled adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from places import use_own_folders
from releases import NAME, release
from transformers import LlamaConfig

from lora_plugins import plan
from registry import pull_adapter, versions, yank
from registry.hubs.folder import FolderHub
from registry.publishing.changes import Published

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    use_own_folders(tmp_path, monkeypatch)
    return release(FolderHub(tmp_path / "hub"), "1.0.0")


def text_of(html: str) -> str:
    """The text of a table, which must be well-formed."""
    return " ".join(ElementTree.fromstring(html).itertext())


def test_published_and_pulled_in_one_line_and_as_a_table(published: Published, tmp_path: Path) -> None:
    assert repr(published) == f"<Published {NAME}@1.0.0, published>"
    adapter = pull_adapter(NAME, hub=tmp_path / "hub")
    assert repr(adapter) == f"<Adapter {NAME}@1.0.0 in {adapter.path}>"
    for shown in (published, adapter):
        text = text_of(shown._repr_html_())
        assert f"{NAME}@1.0.0" in text
        assert "org/base@bbbbbbbbbbbb" in text
        assert published.commit in text


def test_a_list_of_versions_in_a_line_each(published: Published, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    yank(f"{NAME}@1.0.0", "trained on <b>the test set</b>", hub=hub)
    assert repr(versions(NAME, hub=hub)) == f"[<Release {NAME}@1.0.0, withdrawn>]"
    (found,) = versions(NAME, hub=hub)
    assert "trained on <b>the test set</b>" in text_of(found._repr_html_())


def test_a_repeated_push_and_a_dry_run_say_so(published: Published) -> None:
    assert repr(replace(published, created=False)).endswith("had been published before>")
    assert repr(replace(published, created=False, dry_run=True)).endswith("dry run>")


def test_foreign_text_is_shown_as_text(published: Published) -> None:
    base = replace(published.manifest.base, id=HOSTILE)
    manifest = replace(published.manifest, base=base, metrics={HOSTILE: 0.5}, training={"quantization": HOSTILE})
    html = replace(published, manifest=manifest, url=HOSTILE)._repr_html_()
    assert "<script" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert text_of(html).count("<script>alert(1)</script>") == 4


def test_a_plan_in_one_line_and_as_its_tables() -> None:
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    planned = plan(config, quantization="int8")
    line = repr(planned)
    assert "\n" not in line
    assert f"{planned.trainable:,} of {planned.total:,} trained, int8" in line
    html = planned._repr_html_()
    assert html.startswith("<pre>")
    assert "memory needed" in html
    assert f"{planned.trainable:,}" in html


def test_a_notebook_shows_a_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich displays what it prints, whatever file it was given."""
    displayed: list[object] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *shown: displayed.append(shown))
    planned = plan(LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    assert "memory needed" in planned._repr_html_()
    assert "memory needed" in str(planned)
    assert displayed == []
