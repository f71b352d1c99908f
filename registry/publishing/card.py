"""The model card of a release: front matter, facts, results, usage.

All text from outside is escaped: a name can add neither a key to the front matter nor HTML to the page.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from packaging.version import Version

from registry.checks.lineage import list_lineage
from registry.checks.serving import Verdict
from registry.formats.readme import write_readme
from registry.text import visible

__all__ = ["LOSS_CURVE", "CardFields", "loss_curve", "model_card"]

#: File name of the card's picture, which is next to the card.
LOSS_CURVE = "loss.png"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#!|~$])")
#: transformers auto classes for PEFT's task types.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
#: Metric names that are sent to the Hub's listings; the results table has all metrics.
_METRIC = re.compile(r"[\w@./ -]{1,100}", re.ASCII)
#: The Hub's tasks by the suffix of a class name. ``ForConditionalGeneration`` is omitted because it is used for text,
#: speech and images.
_PIPELINES_BY_CLASS = {
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForCausalLM": "text-generation",
    "ForImageClassification": "image-classification",
    "ForImageTextToText": "image-text-to-text",
    "ForMaskedLM": "fill-mask",
    "ForObjectDetection": "object-detection",
    "ForQuestionAnswering": "question-answering",
    "ForSemanticSegmentation": "image-segmentation",
    "ForSequenceClassification": "text-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForTokenClassification": "token-classification",
    "LMHeadModel": "text-generation",
}
#: The Hub's tasks by PEFT task type, for a base of unknown class.
_PIPELINES_BY_TASK = {
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}


@dataclass(frozen=True)
class CardFields:
    """The publisher's information for the Hub's listings; fields not given are not written.

    Attributes:
        license: Id of a license, such as ``"apache-2.0"``.
        datasets: Ids of the training datasets.
        language: Code of the language, such as ``"en"``, or several.
        pipeline_tag: The Hub's task; by default derived from the class of the base.
        appendix: Markdown for the end of the card, in which text of others is escaped.
    """

    license: str | None = None
    datasets: Sequence[str] = field(default=())
    language: str | Sequence[str] | None = None
    pipeline_tag: str | None = None
    appendix: str = ""


def model_card(
    *,
    name: str | None,
    version: str | None,
    base: str | None,
    base_commit: str | None,
    parameters: Sequence[tuple[str, int, int]],
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
    picture: bool,
    lineage: Mapping[str, Any] | None = None,
    task_type: str | None = None,
    class_name: str | None = None,
    fields: CardFields | None = None,
    servers: Sequence[Verdict] = (),
) -> str:
    """Return the card as a README: front matter, and Markdown between the markers of `registry.formats.readme`.

    Args:
        name: ``org/name``; ``None`` for an adapter that is not published.
        version: Version of the release, if it is published.
        base: Id of the base model, if it has one.
        base_commit: Commit of the base model.
        parameters: Module kind, number of tensors, number of parameters.
        training: Facts about the training, by name; nested ones are flattened.
        metrics: Results by name.
        picture: Whether there is a loss curve.
        lineage: What the adapter was trained from; ``None`` leaves the section out.
        task_type: PEFT's task type, such as ``CAUSAL_LM``.
        class_name: transformers class of the base, if known.
        fields: The publisher's information for the front matter.
        servers: Each server's verdict on the adapter.
    """
    facts = list(_flatten(training))
    sections = [
        f"# {_escape_text(name)} {_escape_text(version)}" if name and version else "# LoRA adapter",
        _write_about(base, base_commit, published=name is not None),
        _write_servers(servers),
        _write_table(
            ("module", "tensors", "parameters"), [(kind, f"{n:,}", f"{size:,}") for kind, n, size in parameters]
        ),
        "## Results\n\n" + _write_table(("metric", "value"), list(metrics.items())) if metrics else "",
        "## Training\n\n" + _write_table(("setting", "value"), facts) if facts else "",
        _write_lineage(lineage) if lineage is not None else "",
        f"![Training loss by step]({LOSS_CURVE})" if picture else "",
        _write_usage(name, version, base, task_type) if name and version else _write_plain_usage(base, task_type),
    ]
    told = fields or CardFields()
    body = "\n\n".join(section.strip() for section in [*sections, told.appendix] if section)
    pipeline = told.pipeline_tag or _find_pipeline(class_name, task_type)
    return write_readme(_make_front_matter(name, base, metrics, told, pipeline), body)


def loss_curve(log: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Return a PNG of the training and evaluation loss in a Trainer's log; ``None`` if there are too few points."""
    curves = {label: _read_points(log, key) for label, key in (("training", "loss"), ("evaluation", "eval_loss"))}
    if not any(len(points) > 1 for points in curves.values()):
        return None
    return _draw(tuple(curves.items()))


@lru_cache(maxsize=4)
def _draw(curves: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]) -> bytes:
    """Draw the picture; cached for retries of a push."""
    # Imported late because matplotlib loads slowly.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps global state and may require a display.
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, points in curves:
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", label=label)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    # Without metadata, the same curve gives the same bytes.
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    return picture.getvalue()


def _read_points(log: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    found = [(entry.get("step"), entry.get(key)) for entry in log if isinstance(entry, Mapping)]
    return tuple(
        (step, loss) for step, loss in found if isinstance(step, (int, float)) and isinstance(loss, (int, float))
    )


def _find_pipeline(class_name: str | None, task_type: str | None) -> str | None:
    if class_name is None:
        return _PIPELINES_BY_TASK.get(task_type or "")
    return next((task for end, task in _PIPELINES_BY_CLASS.items() if class_name.endswith(end)), None)


def _make_front_matter(
    name: str | None, base: str | None, metrics: Mapping[str, float], fields: CardFields, pipeline: str | None
) -> dict[str, Any]:
    # Imported late because huggingface_hub loads slowly.
    from huggingface_hub import EvalResult, ModelCardData

    dataset = next(iter(fields.datasets), "unknown")
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if name is not None and _METRIC.fullmatch(metric)
    ]
    tags = ["lora", "lora-plugins", "peft", *([f"base_model:adapter:{base}"] if base is not None else [])]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name="peft",
        license=fields.license,
        datasets=list(fields.datasets) or None,
        language=fields.language if fields.language is None or isinstance(fields.language, str) else [*fields.language],
        pipeline_tag=pipeline,
        tags=tags,
        eval_results=results or None,
        model_name=name if results else None,
    )
    return dict(data.to_dict())


def _write_about(base: str | None, commit: str | None, *, published: bool) -> str:
    if base is None:
        if not published:
            return "A LoRA adapter. Its base model was loaded from a folder."
        return "A LoRA adapter. Its base model is known by its fingerprint only; `adapter_manifest.json` has it."
    pinned = f" at commit `{_escape_code(commit)}`" if commit else ""
    return f"A LoRA adapter for `{_escape_code(base)}`{pinned}."


def _write_servers(servers: Sequence[Verdict]) -> str:
    taking, others = (
        ", ".join(_escape_text(f"{one.server} {one.version}") for one in servers if one.served is served)
        for served in (True, False)
    )
    if not taking and not others:
        return ""
    less = f" Not on {others}; `lora-plugins servers` says why." if others else ""
    return f"Serves on {taking or 'none of the servers whose rules are known'}, by the rules of these releases.{less}"


def _write_lineage(lineage: Mapping[str, Any]) -> str:
    return "## Lineage\n\n" + _write_table(("trained from", ""), list_lineage(lineage))


def _write_usage(name: str, version: str, base: str | None, task_type: str | None) -> str:
    tag = f"v{Version(version)}"
    reference = json.dumps(f"{name}@{version}")
    load = "load()" if base else "load(base)  # a model or a folder"
    return (
        "## Use\n\nVerified, with the base model that it was trained on:\n\n"
        f"```python\nfrom registry import pull_adapter\n\nmodel = pull_adapter({reference}).{load}\n```\n\n"
        "With PEFT alone:\n\n" + _write_peft_code(base, task_type, f"{json.dumps(name)}, revision={json.dumps(tag)}")
    )


def _write_plain_usage(base: str | None, task_type: str | None) -> str:
    return "## Use\n\n" + _write_peft_code(base, task_type, '"."  # the folder or repository of this file')


def _write_peft_code(base: str | None, task_type: str | None, place: str) -> str:
    auto = _AUTO_CLASSES.get(task_type or "", "AutoModel")
    place, _, comment = place.partition("  #")
    model = f"{auto}.from_pretrained({json.dumps(base)})" if base else "...  # the model it was trained on"
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\nbase = {model}\n"
        f"model = PeftModel.from_pretrained(base, {place})" + (f"  #{comment}" if comment else "") + "\n```"
    )


def _write_table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if row is lines[1] else _format_cell(cell) for cell in row) + " |" for row in lines
    )


def _format_cell(value: Any) -> str:
    return _escape_text(f"{value:.6g}" if isinstance(value, float) else str(value))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value))
    return rows


def _escape_text(text: str) -> str:
    """Return text on one line with Markdown and HTML escaped, and control and bidirectional characters removed."""
    return html.escape(_MARKDOWN.sub(r"\\\1", visible(text)), quote=False)


def _escape_code(text: str) -> str:
    return visible(text).replace("`", "'")
