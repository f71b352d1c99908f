"""Collect what the report page shows, from a run's folder or a release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_plugins.adapters.files import ADAPTER_FILE
from lora_plugins.errors import ReportError
from lora_plugins.recipe.files import read_json
from registry import compare_layers, expand_path, is_path, list_lineage, pull_adapter, read_lineage

__all__ = ["HELD_OUT", "RunFacts", "collect_facts", "collect_run"]

#: Fields of a parameter report that the page shows, and their types.
_OF_REPORT: Mapping[str, Any] = {
    "model": str, "trainable": int, "total": int, "percent": (int, float), "quantized_share": (int, float),
    "bytes_by_dtype": dict, "bytes_quantization_state": int, "bytes_after": int, "targets": list, "bare": dict,
    "coverage": dict, "notes": list, "source": str,
}  # fmt: skip
#: Names of held-out losses in a log; of several data sets, each has its name in it.
HELD_OUT = re.compile(r"eval_(?:(?P<name>.+)_)?loss", re.DOTALL)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page shows; what is empty is said not to be recorded.

    Attributes:
        title: Name of the run or release.
        facts: What it is, as label and value.
        log: The Trainer's log.
        metrics: Results by name.
        report: The parameter report, as ``ParameterReport.to_dict()``.
        layers: Layers and the norm of what the adapter adds to each.
        lineage: Rows of the lineage.
        checks: Names of the checks that are ``on``, and of those ``switched off``; empty if it is not recorded.
        samples: Prompt, and text before and after, where the run has generated any.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    log: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[tuple[str, float]] = ()
    lineage: Sequence[tuple[str, str]] = ()
    checks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()


def collect_facts(source: str, hub: str | None = None) -> RunFacts:
    """Read a release, an adapter's folder, or the output folder of a run.

    Raises:
        ReportError: The folder holds neither an adapter nor a run.
        RegistryError: The release cannot be pulled, or a file of the adapter is malformed.
    """
    return collect_run(expand_path(source)) if is_path(source) else _collect_release(source, hub)


def _collect_release(reference: str, hub: str | None) -> RunFacts:
    # A page of a version is not what the project has locked.
    adapter = pull_adapter(reference, hub=hub, lock=False)
    manifest = adapter.manifest
    lineage: Mapping[str, Any] = manifest.lineage
    facts = [(label, str(value)) for label, value in manifest.list_facts() if value and label not in manifest.metrics]
    return RunFacts(
        title=str(adapter),
        facts=[*facts, ("manifest", manifest.digest)],
        log=_make_log(lineage),
        metrics=manifest.metrics,
        layers=_measure(Path(adapter.path)),
        lineage=list_lineage(lineage),
        checks=_read_checks(lineage),
    )


def collect_run(folder: Path, adapter: Path | None = None, samples: Sequence[Mapping[str, str]] = ()) -> RunFacts:
    """Read the output folder of a run, or an adapter's folder.

    Args:
        folder: The folder.
        adapter: Folder of the adapter, if it is not in ``folder``.
        samples: Text that the run has generated, if any.

    Raises:
        ReportError: It holds neither an adapter nor a run.
    """
    place = adapter or _find_adapter(folder)
    if place is None:
        raise ReportError(
            f"{folder} holds no {ADAPTER_FILE}, neither itself nor in adapter/ or a checkpoint: give the output folder "
            "of a run, an adapter's folder, or org/name@version in the registry."
        )
    lineage = read_lineage(place)
    figures = _read(folder / "metrics.json")
    log = figures.get("log") or _read(place / "trainer_state.json").get("log_history") or _make_log(lineage)
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    return RunFacts(
        title=folder.resolve().name,
        facts=_list_data(figures.get("data")),
        log=entries,
        metrics=_find_metrics(entries, figures),
        report=_read_report(folder / "parameter_report.json"),
        layers=_measure(place),
        lineage=list_lineage(lineage),
        checks=_read_checks(lineage),
        samples=samples,
    )


def _find_adapter(folder: Path) -> Path | None:
    """Return the folder of a run's adapter: its own, ``adapter/``, or its last checkpoint."""
    matches = ((path, _CHECKPOINT.fullmatch(path.name)) for path in folder.glob("checkpoint-*"))
    checkpoints = {int(match[1]): path for path, match in matches if match}
    places = [folder, folder / "adapter", *(checkpoints[step] for step in sorted(checkpoints, reverse=True))]
    return next((place for place in places if (place / ADAPTER_FILE).is_file()), None)


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is none or it cannot be read."""
    try:
        return read_json(file, ValueError)
    except (OSError, ValueError):
        return {}


def _read_report(file: Path) -> dict[str, Any]:
    """Return the parameter report in a file; empty if it is none."""
    found = _read(file)
    whole = all(isinstance(found.get(name), kinds) for name, kinds in _OF_REPORT.items())
    rows = found.get("targets") if whole else ()
    pairs = found["coverage"].values() if whole else ()
    parts = all(isinstance(row, dict) and {"name", "modules", "shapes"} <= row.keys() for row in rows or ())
    sound = whole and parts and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    return {**found, "left_out": _list_left_out(found)} if sound else {}


def _list_left_out(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Return modules without an adapter: pattern, number, reason; reports of former releases have no reasons."""
    rows = report.get("left_out")
    known = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if known:
        return [(str(row.get("name")), row.get("modules", 0), str(row.get("why"))) for row in known]
    return [(name, count, "the reason is not recorded") for name, count in report["bare"].items()]


def _measure(folder: Path) -> list[tuple[str, float]]:
    return [(change.name, change.before) for change in compare_layers(folder, folder)]


def _make_log(lineage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the losses and gradient norms in a lineage as a log; empty if they are not lists of one length."""
    losses = lineage.get("losses")
    lists = {name: losses.get(name) for name in ("step", "loss", "grad_norm")} if isinstance(losses, Mapping) else {}
    known = {name: values for name, values in lists.items() if isinstance(values, list)}
    if not {"step", "loss"} <= known.keys() or len({len(values) for values in known.values()}) != 1:
        return []
    entries = (dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def _read_checks(lineage: Mapping[str, Any]) -> dict[str, list[str]]:
    found = lineage.get("checks")
    items = found.items() if isinstance(found, Mapping) else ()
    # Releases from before the name was mended call those that are on "ran".
    return {
        "on" if key == "ran" else str(key): list(map(str, names)) for key, names in items if isinstance(names, list)
    }


def _list_data(data: Any) -> list[tuple[str, str]]:
    rows = []
    for part, counts in data.items() if isinstance(data, Mapping) else ():
        items = counts.items() if isinstance(counts, Mapping) else ()
        text = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in items if isinstance(number, int))
        rows.append((f"data ({str(part).replace('_', ' ')})", text))
    return rows


def _find_metrics(log: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the last losses, and those of the first evaluation, which is the one before training if there was one."""
    found = {key: figures[key] for key in ("loss", "eval_loss", "train_loss", "train_runtime") if key in figures}
    for entry in log:
        shown = (key for key in entry if key in ("loss", "train_loss") or HELD_OUT.fullmatch(str(key)))
        found.update({key: entry[key] for key in shown})
    return {key: float(value) for key, value in found.items() if isinstance(value, (int, float))}
