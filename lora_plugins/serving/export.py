"""Write an adapter in the form that a server takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_plugins.errors import ExportError, UnsupportedExport
from lora_plugins.merging.merge import merge_and_save
from lora_plugins.serving.check import check_export
from lora_plugins.serving.folders import write_folder
from lora_plugins.serving.gguf_file import GgufDtype, write_gguf
from lora_plugins.serving.launching import make_launch_line, make_modelfile
from lora_plugins.serving.source import Source, read_source
from lora_plugins.text import private_folder, write_file
from registry import expand_path

__all__ = ["ExportFormat", "ExportResult", "export_adapter"]

#: ``gguf``: a LoRA file for llama.cpp. ``ollama``: a folder with that file and a Modelfile. ``peft``: a PEFT folder.
#: ``vllm``, ``sglang``: a PEFT folder, and the server's launch line.
ExportFormat = Literal["gguf", "ollama", "peft", "sglang", "vllm"]


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        output: The written file or folder.
        to: Its format.
        adapter: ``org/name@version`` of a release, else the name of the adapter's folder.
        base: Base model.
        tensors: Number of adapted tensors of the base in a GGUF file, of tensors in a PEFT folder's file; 0 for a
            merged model.
        merged: Whether it is a merged model.
        launch: Shell command that serves it; empty for ``peft``.
    """

    output: Path
    to: str
    adapter: str
    base: str
    tensors: int
    merged: bool
    launch: str

    def line(self) -> str:
        """Return the result as text for a terminal."""
        what = f"merged into {self.base}" if self.merged else f"for {self.base}, {self.tensors} tensors"
        told = f"{self.adapter}, {what}: {self.output}"
        return f"{told}\n{self.launch}" if self.launch else told

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "output": str(self.output),
            "to": self.to,
            "adapter": self.adapter,
            "base": self.base,
            "tensors": self.tensors,
            "merged": self.merged,
            "launch": self.launch,
        }


def export_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: ExportFormat,
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    model: str | None = None,
    dtype: GgufDtype = "f32",
    merged: bool = False,
    overwrite: bool = False,
) -> ExportResult:
    """Write an adapter in the form that a server takes, after the check that it belongs to its base.

    The base's weights are not read, unless ``merged=True``.

    Args:
        adapter: Adapter folder (a path, or a string that begins with ``/``, ``.`` or ``~``), or a registry reference.
        output: A file for ``"gguf"``, else a folder.
        to: Format.
        base: Base model; default is the one that the adapter names.
        revision: Revision of the base model.
        model: The base in the server's own form, for ``"ollama"`` and ``"gguf"``: a GGUF file, or a model's name in
            Ollama.
        dtype: Dtype of the factors in a GGUF file.
        merged: Write the merged model instead of the adapter.
        overwrite: Whether existing files may be replaced.

    Raises:
        ExportError: A setting or file is missing or in the way. Nothing is written then.
        UnsupportedExport: The server has no place for something that the adapter has; the message names it.
        MergeError: The base is unknown or cannot be read, or the merge fails.
        MismatchedBase: The adapter was trained on another base, or does not fit this one.
    """
    _check_request(to, dtype, model, merged=merged)
    target = expand_path(output)
    _check_free(target, to, overwrite=overwrite)
    source = read_source(adapter, base, revision)
    if to in ("ollama", "sglang", "vllm") and not merged:
        check_export(source, to)
    if merged:
        tensors = _export_merged(source, target, to, overwrite=overwrite)
    elif to == "gguf":
        tensors = write_gguf(source, target, dtype)
    else:
        tensors = _write_folder(source, target, to, model, dtype)
    return ExportResult(
        output=target,
        to=to,
        adapter=source.title,
        base=source.job.base,
        tensors=tensors,
        merged=merged,
        launch=make_launch_line(source, to, target, merged=merged, model=model),
    )


def _check_request(to: str, dtype: str, model: str | None, *, merged: bool) -> None:
    if to not in get_args(ExportFormat):
        raise ExportError(f"to must be {', '.join(map(repr, get_args(ExportFormat)))}, not {to!r}")
    if dtype not in get_args(GgufDtype):
        raise ExportError(f"dtype must be {', '.join(map(repr, get_args(GgufDtype)))}, not {dtype!r}")
    if merged and to == "gguf":
        raise UnsupportedExport(
            "A merged model becomes GGUF by llama.cpp's own convert_hf_to_gguf.py: export with to='peft' (--to peft) "
            "and merged=True (--merged), and give that script the folder."
        )
    if to == "ollama" and not merged and not model:
        raise ExportError(
            "A Modelfile names the base in Ollama's form: pass model= (--model), its name there such as llama3.2:1b, "
            "or its GGUF file. It must be the base that the adapter was trained on."
        )
    if model and "\n" in model:
        raise ExportError(f"model must be one line, not {model!r}")


def _check_free(target: Path, to: str, *, overwrite: bool) -> None:
    """Refuse to write over files, and over a folder that is not an export at all."""
    if to == "gguf":
        if target.is_dir():
            raise ExportError(f"{target} is a folder. Name the file to write, such as {target / 'adapter.gguf'}.")
        if target.exists() and not overwrite:
            raise ExportError(f"{target} exists. Choose another file, or pass overwrite=True (--overwrite).")
        return
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file. Name a folder to write.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ExportError(f"The folder {target} is not empty. Choose another, or pass overwrite=True (--overwrite).")


def _write_folder(source: Source, target: Path, to: str, model: str | None, dtype: GgufDtype) -> int:
    """Write the files beside ``target``, and move them into it at the end."""
    with private_folder(target) as folder:
        count = _fill(source, folder, to, model, dtype)
        target.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            os.replace(path, target / path.name)
    return count


def _fill(source: Source, folder: Path, to: str, model: str | None, dtype: GgufDtype) -> int:
    if to != "ollama":
        return write_folder(source, folder)
    assert model is not None, "checked before"  # noqa: S101
    count = write_gguf(source, folder / "adapter.gguf", dtype)
    found = expand_path(model)
    # Ollama looks for relative paths beside the Modelfile.
    base = str(found.resolve()) if found.is_file() else model
    (folder / "Modelfile").write_text(make_modelfile(base, "./adapter.gguf"), encoding="utf-8")
    return count


def _export_merged(source: Source, target: Path, to: str, *, overwrite: bool) -> int:
    folder = target / "model" if to == "ollama" else target
    merge_and_save(
        source.job.folder, folder, "bf16", base=source.job.base, revision=source.job.revision, overwrite=overwrite
    )
    if to == "ollama":
        write_file(target / "Modelfile", make_modelfile("./model", None))
    return 0
