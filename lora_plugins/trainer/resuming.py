"""Compare a run that resumes with the one that wrote the checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.lineage.recording import continue_lineage
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.errors import AdapterMismatch, BrokenCheckpoint, LivenessWarning, ResumeConflict
from lora_plugins.plugins.packages import installed_versions
from lora_plugins.text import write_json

__all__ = ["RUN_FILE", "compare_runs", "describe_run", "has_optimizer", "write_run"]


#: File in a checkpoint that describes the run that wrote it.
RUN_FILE = "lora_plugins_run.json"
#: Names of the optimizer's state in a checkpoint: plain, FSDP's whole or sharded, DeepSpeed's.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
#: Arguments that decide which rows a step sees, and in which order.
_ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "length_column_name",
    "ignore_data_skip",
)
_PACKAGES = ("lora-plugins", "peft", "transformers", "accelerate", "torch")
#: Fields of an adapter's configuration that do not affect what is trained.
_SILENT = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same when a run resumes, as plain data.

    Keys are ``versions``, ``quantization``, ``optim`` and ``data``.
    """
    record = preparation_of(trainer.model)
    quantization = record.quantization if record is not None else None
    libraries = installed_versions(quantization.quantizer.requires) if quantization is not None else {}
    rows = trainer.train_dataset
    return {
        "versions": {name: version for name in (*_PACKAGES, *libraries) if (version := _find_version(name))},
        "quantization": quantization.name if quantization is not None else None,
        "optim": _unwrap_enum(trainer.args.optim),
        "data": {
            **{name: _unwrap_enum(getattr(trainer.args, name)) for name in _ORDER if hasattr(trainer.args, name)},
            "rows": len(rows) if hasattr(rows, "__len__") else None,
        },
    }


def write_run(trainer: Trainer, folder: Path) -> None:
    """Write `describe_run` into a checkpoint."""
    write_json(folder / RUN_FILE, describe_run(trainer))


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unwrap_enum(value: Any) -> Any:
    return getattr(value, "value", value)


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint holds the state of an optimizer."""
    return any(any(folder.glob(name)) for name in _OPTIMIZER_FILES)


def compare_runs(trainer: Trainer, folder: Path) -> None:
    """Raise `ResumeConflict` if settings that determine the run differ; warn if package versions do."""
    continue_lineage(trainer.model, folder)
    differences = list(_compare_adapters(trainer.model, folder)) if isinstance(trainer.model, PeftModel) else []
    file = folder / RUN_FILE
    if file.is_file():
        before, now = _read_object(file), describe_run(trainer)
        differences += _compare_values("", before, now, ("quantization", "optim"))
        differences += _compare_values("", before.get("data", {}), now["data"])
        versions = list(_compare_values("", before.get("versions", {}), now["versions"]))
        if versions:
            warnings.warn(
                f"The checkpoint {folder} was written with other releases, so the run may go on differently: "
                f"{'; '.join(versions)}.",
                LivenessWarning,
                stacklevel=2,
            )
    if differences:
        raise ResumeConflict(
            f"The checkpoint {folder} is of another run: {'; '.join(differences)}. Resume with the same arguments, or "
            f"start a new run from its adapter with LoraCallback(adapter={str(folder)!r})."
        )


def _compare_adapters(model: PeftModel, folder: Path) -> Iterator[str]:
    for name, config in model.peft_config.items():
        file = adapters.find_adapter_file(folder, name)
        if file is None or config.is_prompt_learning:
            continue
        stored = _read_object(file.parent / adapters.ADAPTER_CONFIG)
        now = config.to_dict()
        yield from _compare_values(f"{name}: ", stored, now)
        yield from _compare_tensors(model, name, file)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{file} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise BrokenCheckpoint(f"{file} cannot be read: it must hold an object")
    return stored


def _compare_values(
    prefix: str, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None
) -> Iterator[str]:
    """Yield the differences, by default in all names that both sides have."""
    for name in sorted(before.keys() & now.keys() - _SILENT) if names is None else names:
        old, new = _normalize(before.get(name)), _normalize(now.get(name))
        if old != new:
            yield f"{prefix}{name} was {old!r} and is {new!r}"


def _normalize(value: Any) -> Any:
    """Return a value as JSON would give it back, sets and lists of names in one order."""
    value = _unwrap_enum(value)
    if isinstance(value, Mapping):
        return {str(key): _normalize(item) for key, item in value.items()} or None
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted((_normalize(item) for item in value), key=str)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _compare_tensors(model: PeftModel, adapter_name: str, file: Path) -> Iterator[str]:
    """Compare the tensors' names and shapes, whatever the configurations say."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
        adapters.check_same_tensors(shapes, adapters.adapter_shapes(model, adapter_name), file)
    except AdapterMismatch as error:
        yield str(error).rstrip(".")
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{file} cannot be read: {error}") from error
