"""``lora-plugins merge``: merge an adapter into its base model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_plugins.commands.hub import HubOption, find_adapter
from lora_plugins.recipe.arguments import json_object

__all__ = ["Dtype", "merge"]


class Dtype(StrEnum):
    """The weights that the adapter is merged into."""

    fp16 = "fp16"
    bf16 = "bf16"
    same = "same"


def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter: a folder (/… or ./…), or org/name@version in the registry.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Reload the base in 16 bits, or use the same dequantized weights as the training.")
    ] = Dtype.fp16,
    base: Annotated[str | None, typer.Option(help="Base model; default is the one the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")] = None,
    hub: HubOption = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Backend of the training, with options as JSON, or 'none'; default is the recorded one."),
    ] = None,
    probe: Annotated[bool, typer.Option(help="Measure how far the merged model is from the trained one.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, as a model that transformers loads without PEFT.

    \b
    Examples:
      lora-plugins merge ./adapter ./merged
      lora-plugins merge org/name@1.2.0 ./merged --dtype bf16 --hub ./registry
    """
    from lora_plugins.merging import inputs, job, merge

    result = merge.merge_and_save(
        find_adapter(adapter, hub),
        output,
        dtype.value,
        base=base,
        revision=revision,
        quantization=_read_quantization(quantization, job.AS_TRAINED),
        probe=inputs.PROBE_TEXT if probe else None,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.line())


def _read_quantization(text: str | None, default: str) -> Any:
    if text is None:
        return default
    return json_object("--quantization", text) if "{" in text else text
