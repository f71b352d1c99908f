"""Read the names and shapes of the tensors in a model's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

__all__ = ["Checkpoint", "find_checkpoint", "find_pretrained", "locate", "read_stored_config"]


_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

#: How many tensors are compared at most to decide whether a model was loaded from a checkpoint.
_SAMPLES = 16


class Checkpoint:
    """The headers of a local checkpoint; values are read on demand.

    Args:
        files: Its safetensors files.

    Attributes:
        shapes: Shape of each tensor by its name in the files.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    self._file_of[name] = file
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def rows(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return the number of rows of an embedding in the files, ``None`` if no tensor matches it.

        Args:
            name: Name of the embedding's weight in the model; the files may put it under another prefix.
            shape: Shape of the weight in the model.
        """
        end = "." + ".".join(name.split(".")[-2:])
        alike = [found for key, found in self.shapes.items() if f".{key}".endswith(end)]
        sizes = [found[0] for found in alike if len(found) == 2 and found[1:] == tuple(shape)[1:]]
        return max(sizes, default=None)

    def holds(self, name: str, value: torch.Tensor) -> bool:
        """Whether the files hold these values under this name; a constant tensor never counts as a match."""
        if name not in self.shapes or self.shapes[name] != tuple(value.shape) or not value.ndim or value.is_meta:
            return False
        row = self.shapes[name][0] // 2
        with safe_open(str(self._file_of[name]), "pt") as opened:
            stored = opened.get_slice(name)[row : row + 1]
        live = value.detach()[row : row + 1].cpu()
        # Either may have been cast: compare in the coarser dtype.
        coarse = min((stored.dtype, live.dtype), key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
        stored, live = stored.to(coarse), live.to(coarse)
        return bool((stored != stored.flatten()[0]).any()) and torch.equal(stored, live)

    def is_source_of(self, model: nn.Module) -> bool:
        """Whether the model holds values of these files; assumed for a model with parameters on the meta device."""
        prefix = getattr(model, "base_model_prefix", "") + "."
        tried = 0
        for name, value in model.named_parameters():
            if value.device.type == "meta":
                return True
            key = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in self.shapes), None)
            if key is None or not value.is_floating_point() or value.ndim < 2 or hasattr(value, "ds_id"):
                continue
            if self.holds(key, value):
                return True
            tried += 1
            if tried == _SAMPLES:
                break
        return False


def find_pretrained(model: nn.Module) -> tuple[str, PreTrainedModel] | None:
    """Return the first `PreTrainedModel` in a model and its path, ``None`` if there is none."""
    return next(((path, part) for path, part in model.named_modules() if isinstance(part, PreTrainedModel)), None)


def find_checkpoint(model: nn.Module) -> Checkpoint | None:
    """Return the headers of the checkpoint that a model names as its source, ``None`` unless it is on this machine.

    Only the folder or the Hub's cache is read; there are no network requests.
    """
    source, commit = _find_source(model)
    if not source:
        return None
    try:
        files = _find_files(source, commit)
        return Checkpoint(files) if files else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        # Treat an unreadable checkpoint as absent; loading it reports what is wrong.
        return None


def read_stored_config(model: nn.Module) -> dict[str, Any]:
    """Return the ``config.json`` of a model's checkpoint, empty unless it is on this machine."""
    source, commit = _find_source(model)
    try:
        file = locate(source, "config.json", commit) if source else None
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _find_source(model: nn.Module) -> tuple[str, str | None]:
    """Return the folder or Hub id that a model names as its source, empty if it names none, and the commit."""
    config: Any = getattr(model, "config", None)
    source = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    return source, getattr(config, "_commit_hash", None)


def _find_files(source: str, commit: str | None) -> list[Path]:
    single = locate(source, _SINGLE, commit)
    if single is not None:
        return [single]
    index = locate(source, _INDEX, commit)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [locate(source, str(name), commit) for name in names]
    return [file for file in found if file is not None] if all(found) else []


def locate(source: str, name: str, commit: str | None) -> Path | None:
    """Return a file of a folder or of a repository in the Hub's cache, ``None`` if it is not on this machine."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(source, name, revision=commit)
    return Path(cached) if isinstance(cached, str) else None
