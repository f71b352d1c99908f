"""Model cards: what they say, and that nothing from outside gets out of its place."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from adapters import saved
from matplotlib import image

from registry import write_card
from registry.publishing.card import CardFields, loss_curve, model_card

HOSTILE = [
    'x"\nlicense: mit',
    "x\n---\n# owned",
    "<script>alert(1)</script>",
    "a: b # c",
    "[link](javascript:x)",
    "`code` | cell |\n| next |",
    "é\u202eevil",
    "!!python/object:os.system",
]


def card(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "name": "org/name",
        "version": "1.2.0",
        "base": "org/base",
        "base_commit": "b" * 40,
        "parameters": [("q_proj", 4, 1024)],
        "training": {"steps": 10, "arguments": {"learning_rate": 1e-4}},
        "metrics": {"accuracy": 0.5},
        "picture": True,
        "task_type": "CAUSAL_LM",
    }
    return model_card(**{**fields, **changes})


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_what_a_card_says() -> None:
    text = card()
    assert front_matter(text) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-plugins", "peft", "base_model:adapter:org/base"],
        "model-index": [
            {
                "name": "org/name",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "unknown", "name": "unknown"},
                        "metrics": [{"type": "accuracy", "value": 0.5}],
                    }
                ],
            }
        ],
    }
    for line in (
        "# org/name 1.2.0",
        "| q\\_proj | 4 | 1,024 |",
        "| accuracy | 0.5 |",
        "| arguments.learning\\_rate | 0.0001 |",
        "![Training loss by step](loss.png)",
        'model = pull_adapter("org/name@1.2.0").load()',
        'base = AutoModelForCausalLM.from_pretrained("org/base")',
        'model = PeftModel.from_pretrained(base, "org/name", revision="v1.2.0")',
    ):
        assert line in text.split("\n"), line


def test_what_a_publisher_says_is_in_the_front_matter() -> None:
    fields = CardFields(license="apache-2.0", datasets=["org/data"], language=["en", "de"])
    found = front_matter(card(fields=fields, class_name="WhisperForConditionalGeneration"))
    assert (found["license"], found["datasets"], found["language"]) == ("apache-2.0", ["org/data"], ["en", "de"])
    assert found["model-index"][0]["results"][0]["dataset"] == {"type": "org/data", "name": "org/data"}
    # That class is used for speech, text and images: which of them is not known.
    assert "pipeline_tag" not in found
    assert front_matter(card(fields=CardFields(pipeline_tag="translation")))["pipeline_tag"] == "translation"


@pytest.mark.parametrize(
    ("class_name", "task_type", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS", "text-classification"),
        ("ViTForImageClassification", None, "image-classification"),
        ("GPT2LMHeadModel", "CAUSAL_LM", "text-generation"),
        ("Wav2Vec2ForCTC", None, "automatic-speech-recognition"),
        ("BertForMaskedLM", None, "fill-mask"),
        ("MyOwnModel", "SEQ_CLS", None),
        (None, "TOKEN_CLS", "token-classification"),
    ],
)
def test_the_hubs_task_follows_from_the_class(class_name: str | None, task_type: str | None, task: str | None) -> None:
    assert front_matter(card(class_name=class_name, task_type=task_type)).get("pipeline_tag") == task


def test_base_without_a_name() -> None:
    text = card(base=None, base_commit=None, metrics={}, training={}, picture=False)
    assert "base_model" not in front_matter(text)
    assert "## Results" not in text
    assert "loss.png" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_front_matter_gets_no_key_from_outside(text: str) -> None:
    found = front_matter(card(base=text))
    assert set(found) == set(front_matter(card()))
    assert found["base_model"] == text
    assert found["tags"][3:] == [f"base_model:adapter:{text}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_front_matter_values_stay_in_their_place(text: str) -> None:
    fields = CardFields(license=text, datasets=[text], language=text, pipeline_tag=text)
    found = front_matter(card(fields=fields))
    assert set(found) == set(front_matter(card(fields=CardFields("x", ["x"], "x", "x"))))
    assert (found["license"], found["datasets"], found["language"], found["pipeline_tag"]) == (text, [text], text, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_page_gets_no_markup_from_outside(text: str) -> None:
    plain = card(parameters=[], training={}, metrics={}, base=None, base_commit=None)
    changed = card(parameters=[(text, 1, 1)], training={text: text}, metrics={text: 1.0}, base=None, base_commit=None)
    assert "<script" not in changed
    assert not re.search(r"(?<!\\)\]\(javascript", changed)
    assert "\u202e" not in changed
    # As many headings and rules as before, and two more sections.
    assert [line for line in changed.split("\n") if line.startswith(("#", "---"))] == [
        *[line for line in plain.split("\n") if line.startswith("---")],
        "# org/name 1.2.0",
        "## Results",
        "## Training",
        "## Use",
    ]
    rows = [line for line in changed.split("\n") if line.startswith("| ")]
    assert len(rows) == 3 * 2 + 3


def test_loss_curve_is_a_picture_of_both_losses() -> None:
    log = [{"step": step, "loss": 1 / (step + 1)} for step in range(30)]
    picture = loss_curve([*log, {"step": 29, "eval_loss": 0.2}, {"train_runtime": 3.0}])
    assert picture is not None
    assert picture == loss_curve([*log, {"step": 29, "eval_loss": 0.2}, {"train_runtime": 3.0}])
    pixels = image.imread(io.BytesIO(picture))
    assert pixels.shape[0] > 200
    assert pixels[..., :3].std() > 0.02
    assert loss_curve(log) != picture


@pytest.mark.parametrize(
    "log", [[], [{"loss": 1.0, "step": 1}], [{"step": 1}, {"step": 2}], [{"loss": "nan", "step": 1}]]
)
def test_no_curve(log: list[dict[str, Any]]) -> None:
    assert loss_curve(log) is None


def test_usage_asks_for_a_base_that_no_id_names() -> None:
    text = card(base=None, base_commit=None)
    assert 'pull_adapter("org/name@1.2.0").load(base)' in text
    assert "base_model" not in front_matter(text)


# -- the card of a folder ------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a base in a folder, with the card that PEFT writes."""
    tiny.llama().save_pretrained(tmp_path / "base")
    return saved(tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "checkpoint-4")


def test_the_card_of_a_checkpoint_names_no_folder(checkpoint: Path) -> None:
    assert str(checkpoint.parent) in (checkpoint / "README.md").read_text()  # PEFT's
    text = write_card(checkpoint).read_text()
    assert str(checkpoint.parent) not in text
    assert "More Information Needed" not in text
    assert "base_model" not in front_matter(text)
    assert "| q\\_proj |" in text


@pytest.mark.parametrize("name", ["base", "./base"])
def test_a_relative_folder_is_not_a_base_model(checkpoint: Path, name: str) -> None:
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    assert "base_model" not in front_matter(write_card(checkpoint).read_text())


def test_the_card_of_a_checkpoint_names_a_base_on_a_hub(checkpoint: Path) -> None:
    file = checkpoint / "adapter_config.json"
    values = {"base_model_name_or_path": "org/base", "revision": "b" * 40}
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    (checkpoint / "trainer_state.json").write_text(
        json.dumps({"global_step": 4, "log_history": [{"step": 4, "eval_loss": 1.5}]})
    )
    text = write_card(checkpoint).read_text()
    assert front_matter(text)["base_model"] == "org/base"
    assert "| eval\\_loss | 1.5 |" in text
    assert "| steps | 4 |" in text


def test_a_readme_that_somebody_wrote_for_a_checkpoint_stays(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# Mine\n")
    assert write_card(checkpoint).read_text() == "# Mine\n"
    (checkpoint / "README.md").unlink()
    text = write_card(checkpoint).read_text()
    (checkpoint / "README.md").write_text(text + "\nMine\n")
    assert write_card(checkpoint).read_text().endswith("\nMine\n")


def test_the_card_of_a_checkpoint_is_not_written_through_a_link(checkpoint: Path, tmp_path: Path) -> None:
    """A link to a file that does not exist yet was taken for no card, and the file was made."""
    (checkpoint / "README.md").unlink()
    (checkpoint / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a symbolic link"):
        write_card(checkpoint)
    assert not (tmp_path / "elsewhere").exists()
