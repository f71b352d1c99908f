"""Read a base model's configuration and single tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import HubFileNotFound, RegistryError, UnsafeFile
from registry.formats.manifest import BASE_ID
from registry.formats.strict_json import JsonRefused, parse
from registry.formats.weights import Header, read_header

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from registry.hubs.protocol import Hub

__all__ = [
    "BaseFiles",
    "LiveTensors",
    "find_base_folder",
    "find_cached_folder",
    "find_cached_snapshots",
    "is_hub_id",
    "matching_name",
    "original_config",
    "original_vocabulary",
]

_SMALL = 32 * 1024 * 1024
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def matching_name(name: str, names: Mapping[str, Any]) -> str | None:
    """Return the entry of ``names`` equal to ``name`` up to a dotted prefix; ``None`` if none or several match."""
    if name in names:
        return name
    found = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


class LiveTensors:
    """The tensors of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        from registry.base.fingerprint import original_name

        self._tensors = {
            original_name(name): tensor
            for name, tensor in model.named_parameters(remove_duplicate=False)
            if "modules_to_save." not in name and "lora_" not in name
        }

    def rows(self, name: str, count: int) -> torch.Tensor | None:
        """See `registry.formats.records.TensorSource`."""
        found = matching_name(name, self._tensors)
        return self._tensors[found][:count] if found is not None else None


@dataclass
class BaseFiles:
    """The files of a base model, in a folder or on a hub.

    Attributes:
        name: Its name in messages.
        read: Returns bytes of a file, given its name, a position and a length.
        sizes: The files with their sizes in bytes.
    """

    name: str
    read: Callable[[str, int, int], bytes]
    sizes: Mapping[str, int]
    _headers: dict[str, Header] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, folder: Path) -> BaseFiles:
        """Return the files of a folder that ``save_pretrained`` wrote."""

        def read(name: str, start: int, length: int) -> bytes:
            with open(folder / name, "rb") as file:
                file.seek(start)
                return file.read(length)

        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        return cls(str(folder), read, sizes)

    @classmethod
    def on_hub(cls, hub: Hub, name: str, commit: str) -> BaseFiles:
        """Return the files of a commit on a hub."""

        def read(file: str, start: int, length: int) -> bytes:
            return hub.read_range(name, commit, file, start, length)

        return cls(f"{name} at {commit[:12]}", read, hub.files(name, commit))

    def config(self) -> PretrainedConfig:
        """Read the model's configuration.

        Raises:
            HubFileNotFound: It has none.
            UnsafeFile: It needs custom code, or cannot be read.
        """
        from transformers import AutoConfig

        values = self._read_document("config.json")
        if "auto_map" in values and "model_type" not in values:
            raise UnsafeFile(f"{self.name} needs code of its own, which is not run: pass the loaded model")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
            try:
                return AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except (ValueError, KeyError, OSError, TypeError) as error:
                first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UnsafeFile(f"The configuration of {self.name} cannot be read here: {first}. Pass the loaded model.")

    def rows(self, name: str, count: int) -> torch.Tensor | None:
        """See `registry.formats.records.TensorSource`."""
        import torch

        header, file, found = self._find_tensor(name)
        if header is None or found is None:
            return None
        record, (begin, end) = header.tensors[found], header.offsets[found]
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(record.dtype)
        if dtype is None or not record.shape:
            return None
        rows = min(count, record.shape[0])
        data = self.read(file, begin, (end - begin) // record.shape[0] * rows)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(rows, *record.shape[1:])

    def _find_tensor(self, name: str) -> tuple[Header | None, str, str | None]:
        """Return the header that lists a tensor, its file, and the tensor's name there."""
        if _INDEX in self.sizes:
            files = self._read_document(_INDEX).get("weight_map", {})
            found = matching_name(name, files)
            file = files[found] if found is not None else None
            if not isinstance(file, str) or file not in self.sizes:
                return None, "", None
        elif _WEIGHTS in self.sizes:
            file = _WEIGHTS
        else:
            return None, "", None
        if file not in self._headers:
            self._headers[file] = read_header(lambda at, length: self.read(file, at, length), self.sizes[file], file)
        header = self._headers[file]
        return header, file, matching_name(name, header.tensors)

    def _read_document(self, name: str) -> dict[str, Any]:
        if name not in self.sizes:
            raise HubFileNotFound(f"{self.name} has no {name}: it is not a base model that can be checked")
        try:
            values = parse(self.read(name, 0, min(self.sizes[name], _SMALL) + 1), _SMALL)
        except JsonRefused as reason:
            raise UnsafeFile(f"{name} of {self.name} cannot be read: {reason}") from None
        if not isinstance(values, dict):
            raise UnsafeFile(f"{name} of {self.name} is not a JSON object")
        return values


def is_hub_id(text: str | None) -> bool:
    """Return whether a base name is a hub id rather than a folder.

    transformers prefers a folder of that name, so a name that is also an existing folder does not count.
    """
    return text is not None and BASE_ID.fullmatch(text) is not None and not Path(text).exists()


def find_base_folder(model: nn.Module) -> Path | None:
    """Return the folder that a model was loaded from, as named or in huggingface_hub's cache; ``None`` if not here."""
    settings: Any = getattr(model, "config", None)
    name = getattr(settings, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        return None
    folder = find_cached_folder(name, getattr(settings, "_commit_hash", None)) if is_hub_id(name) else Path(name)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def original_vocabulary(model: nn.Module) -> int | None:
    """Return the vocabulary size in the files that a model was loaded from; ``None`` if they cannot be read here."""
    loaded = original_config(model)
    size = getattr(loaded.get_text_config(), "vocab_size", None) if loaded is not None else None
    return size if isinstance(size, int) else None


def original_config(model: nn.Module) -> PretrainedConfig | None:
    """Return the configuration in the files that a model was loaded from; ``None`` if they cannot be read here."""
    folder = find_base_folder(model)
    if folder is None:
        return None
    try:
        return BaseFiles.in_folder(folder).config()
    except RegistryError:
        return None


def find_cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in huggingface_hub's cache; ``None`` if it is not there."""
    from registry.hubs.client import cached_folder

    return cached_folder(name, revision or "main")


def find_cached_snapshots(name: str) -> list[Path]:
    """Return the folders of all commits of a model in huggingface_hub's cache."""
    from registry.hubs.client import cached_snapshots

    return cached_snapshots(name)
