"""``lora-plugins export``: write an adapter for a server."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_plugins.commands.hub import HubOption, find_adapter

__all__ = ["export"]


class Format(StrEnum):
    """The forms that servers take."""

    gguf = "gguf"
    ollama = "ollama"
    peft = "peft"
    sglang = "sglang"
    vllm = "vllm"


class Dtype(StrEnum):
    """Dtypes of a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter: a folder (/… or ./…), or org/name@version in the registry.")],
    output: Annotated[Path, typer.Argument(help="File for gguf, folder otherwise.")],
    to: Annotated[Format, typer.Option(help="Server or format.")],
    base: Annotated[str | None, typer.Option(help="Base model; default is the one the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")] = None,
    hub: HubOption = None,
    model: Annotated[
        str | None, typer.Option(help="For gguf and ollama: GGUF file of the base, or its name in Ollama.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the adapter in a GGUF file.")] = Dtype.f32,
    merged: Annotated[bool, typer.Option("--merged", help="Write the merged model instead of the adapter.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write an adapter for llama.cpp, Ollama, vLLM, SGLang or plain PEFT, and print the command that serves it.

    \b
    Examples:
      lora-plugins export org/name@1.2.0 ./adapter.gguf --to gguf
      lora-plugins export org/name@1.2.0 ./served --to ollama --model llama3.2:1b
      lora-plugins export ./adapter ./served --to vllm
    """
    from lora_plugins.serving.export import export_adapter

    result = export_adapter(
        find_adapter(adapter, hub),
        output,
        to.value,
        base=base,
        revision=revision,
        model=model,
        dtype=dtype.value,
        merged=merged,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.line())
