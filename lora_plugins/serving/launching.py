"""The line that starts a server with an exported adapter."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_plugins.serving.source import Source

__all__ = ["make_launch_line", "make_modelfile"]

#: The values that vLLM 0.33 takes for ``--max-lora-rank`` (``vllm/config/lora.py``).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _start_vllm(source: Source, output: Path) -> list[str]:
    rank = next((one for one in _VLLM_RANKS if one >= source.rank), source.rank)
    line = ["vllm", "serve", source.job.base, *_pin(source)]
    return [*line, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{source.short_name}={output}"]


def _start_sglang(source: Source, output: Path) -> list[str]:
    line = ["python", "-m", "sglang.launch_server", "--model-path", source.job.base, *_pin(source)]
    return [
        *line,
        "--enable-lora",
        "--max-lora-rank",
        str(source.rank),
        "--lora-paths",
        f"{source.short_name}={output}",
    ]


_ADAPTER: Mapping[str, Callable[[Source, Path], list[str]]] = {"vllm": _start_vllm, "sglang": _start_sglang}
_MODEL: Mapping[str, tuple[str, ...]] = {
    "vllm": ("vllm", "serve"),
    "sglang": ("python", "-m", "sglang.launch_server", "--model-path"),
}


def _pin(source: Source) -> list[str]:
    return ["--revision", source.job.revision] if source.job.revision and not source.base_is_folder else []


def make_launch_line(source: Source, to: str, output: Path, *, merged: bool, model: str | None) -> str:
    """Return the shell command that serves an export; empty for a format that no server is named for.

    Args:
        source: The adapter.
        to: Format.
        output: The written file or folder.
        merged: Whether it is the merged model.
        model: The base as GGUF file or name in Ollama.
    """
    path = output.resolve()
    if to in _MODEL:
        words = [*_MODEL[to], str(path)] if merged else _ADAPTER[to](source, path)
        return shlex.join(words)
    if to == "ollama":
        return shlex.join(["ollama", "create", source.short_name, "-f", str(path / "Modelfile")])
    if to == "gguf":
        return shlex.join(["llama-server", "--model", model or "BASE.gguf", "--lora", str(path)])
    return ""


def make_modelfile(base: str, adapter: str | None) -> str:
    """Return an Ollama Modelfile.

    Args:
        base: A model's name in Ollama, a GGUF file, or a folder with a merged model.
        adapter: The adapter's GGUF file; ``None`` for a merged model.
    """
    lines = [f"FROM {base}", *([f"ADAPTER {adapter}"] if adapter else [])]
    return "\n".join(lines) + "\n"
