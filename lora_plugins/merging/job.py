"""Read the parts of a merge: adapter, base, quantization in training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from lora_plugins.adapters import files as adapters
from lora_plugins.errors import MergeError, QuantizationError
from lora_plugins.quantization.request import Quantization, parse_quantization
from registry import Adapter, expand_path, is_path

__all__ = ["AS_TRAINED", "RECIPE_FILE", "Job", "MergeDtype", "read_job"]


#: ``fp16`` and ``bf16``: merge into the base reloaded in that dtype. ``same``: merge into the dequantized weights that
#: the adapter was trained on, in the base's stored dtype.
MergeDtype = Literal["fp16", "bf16", "same"]

#: Written beside an adapter by ``lora-plugins train``: its base, template and quantization.
RECIPE_FILE = "recipe.json"

#: Written by the registry; "training" describes the run, "architecture" the class of the base.
MANIFEST_FILE = "adapter_manifest.json"

#: Default for ``quantization``: as recorded in training. ``None`` means a float base.
AS_TRAINED = "as trained"


#: Backends as the registry's first release named them. "bitsandbytes 4-bit" is missing: it may be nf4 or fp4.
_FORMER = {"bitsandbytes 8-bit": "int8"}

#: Keys of a record other than the backend's options.
_NO_OPTIONS = ("name", "known", "options")


@dataclass(frozen=True)
class Job:
    """An adapter and the base that it is merged into.

    Attributes:
        folder: Folder of the adapter.
        file: Its weights.
        config: Its configuration.
        shapes: Shape of each tensor in the file.
        base: Id or folder of the base model.
        revision: The base model's revision, ``None`` for the default branch.
        quantization: Backend that the adapter was trained on; ``None`` for a float base, or if it is unknown.
        as_trained: Whether the quantization in training is known.
        recorded: The recorded quantization, if no backend here has that name.
        class_name: Class of the base in training, if a manifest gives it.
        vocabulary: Rows of the embeddings in training, if a manifest gives them.
    """

    folder: Path
    file: Path
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    base: str
    revision: str | None
    quantization: Quantization | None
    as_trained: bool
    recorded: str | None = None
    class_name: str | None = None
    vocabulary: int | None = None


def read_job(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    revision: str | None,
    quantization: str | Mapping[str, Any] | None,
) -> Job:
    """Collect the facts from the adapter's folder and the caller's arguments.

    Args:
        adapter: Adapter folder, or a registry reference.
        base: Base model, ``None`` for the one that the adapter names.
        revision: Revision of the base model, ``None`` for the one that the adapter names.
        quantization: Backend in training, ``None`` or ``"none"`` for a float base, `AS_TRAINED` for the recorded one.

    Raises:
        MergeError: The base is not known, or a file cannot be read.
        QuantizationError: The backend that the caller names is unknown.
    """
    folder = adapters.adapter_folder(adapter)
    config = adapters.load_config(folder)
    recipe = _read_object(folder / RECIPE_FILE) or {}
    manifest = _read_object(folder / MANIFEST_FILE) or {}
    named = os.fspath(base) if base is not None else recipe.get("base") or config.base_model_name_or_path
    if not named:
        raise MergeError(
            f"{_name_adapter(adapter, folder)} does not say which base model it is for{_find_reason(manifest)}. "
            "Pass base= (--base)."
        )
    if is_path(named):
        named = str(expand_path(named))
    if revision is not None and Path(named).exists():
        raise MergeError(f"revision={revision!r} was given, and the base model {named} is a folder, which has none.")
    file = adapters.find_adapter_file(folder, "default")
    if file is None:
        raise MergeError(f"The folder {folder} has no {adapters.ADAPTER_FILE}.")
    if quantization == AS_TRAINED:
        backend, known, recorded = _read_quantization(recipe, manifest)
    else:
        backend, known, recorded = parse_quantization(None if quantization == "none" else quantization), True, None
    kind = manifest.get("architecture")
    kind = kind if isinstance(kind, dict) else {}
    return Job(
        folder=folder,
        file=file,
        config=config,
        shapes=_read_shapes(file),
        base=named,
        revision=revision or recipe.get("revision") or config.revision,
        quantization=backend,
        as_trained=known,
        recorded=recorded,
        class_name=_take_typed(kind.get("class_name"), str),
        vocabulary=_take_typed(kind.get("vocab_size"), int),
    )


def _name_adapter(adapter: str | os.PathLike[str], folder: Path) -> str:
    """Return how a message calls an adapter: a release by its name."""
    is_release = isinstance(adapter, Adapter) or (isinstance(adapter, str) and not is_path(adapter))
    return str(adapter) if is_release else f"The adapter in {folder}"


def _find_reason(manifest: Mapping[str, Any]) -> str:
    base = manifest.get("base")
    known = isinstance(base, dict) and base.get("fingerprint") is not None
    return ": it was trained on a model in a folder, of which it has the fingerprint" if known else ""


def _read_quantization(
    recipe: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[Quantization | None, bool, str | None]:
    """Return the recorded backend, whether it is known, and the recorded name if no backend here has it."""
    training = manifest.get("training")
    source = next((one for one in (recipe, training) if isinstance(one, dict) and "quantization" in one), None)
    if source is None:
        return None, False, None
    value = source["quantization"]
    value = _FORMER.get(value, value) if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else value
    known = [one.get("known", True) for one in (source, value) if isinstance(one, dict)]
    if False in known:
        return None, False, str(name)
    if isinstance(value, dict):
        value = {"name": name, **(value.get("options") or {k: v for k, v in value.items() if k not in _NO_OPTIONS})}
    try:
        return parse_quantization(None if value == "none" else value), True, None
    except QuantizationError:
        # A base that was quantized elsewhere, or by a plugin or a release that is not installed here.
        return None, False, str(name)


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MergeError(f"{file} cannot be read: {error}") from error


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _take_typed(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None
