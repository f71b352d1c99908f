"""``lora-plugins plan``: show what a run would train and need."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_plugins.commands.hub import HubOption, check_hub, find_adapter
from lora_plugins.plugins.recipes import RECIPES

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or configuration file of the base model.")],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter to continue from (folder or reference), instead of a new one.")
    ] = None,
    hub: HubOption = None,
    r: Annotated[int | None, typer.Option("--r", "-r", min=1, help="Rank of the adapters.", show_default="8")] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Scope or module name; repeatable.", show_default="the architecture's"),
    ] = None,
    experts: Annotated[str, typer.Option(help="Routed experts: none, routed, shared or default.")] = "default",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FIELD=VALUE", help="Another field of peft.LoraConfig, as JSON or text; repeatable."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Named set of LoRA settings: {', '.join(RECIPES)}. Options override it.")
    ] = None,
    quantization: Annotated[str, typer.Option(help="Backend of the frozen base, 'none' or 'auto'.")] = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per device.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens per example.")] = 1024,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    optim: Annotated[str, typer.Option(help="Optimizer, as in TrainingArguments.")] = "adamw_torch_fused",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="single, ddp, zero2, zero3 or fsdp.", show_default="single or ddp")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a device, such as 24GiB.", show_default="this GPU's")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the run, such as cuda.", show_default="cuda if available")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Such as causal-lm.", show_default="the configuration's")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the base's weights.", show_default="the configuration's")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    serve: Annotated[
        list[str] | None,
        typer.Option(help="Server that the adapter is for; repeatable.", show_default="all known"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Write a bar chart of the memory to this PNG file.")] = None,
) -> None:
    """Show what a LoRA run would train, and whether it fits. Reads the configuration only, no weights.

    \b
    Examples:
      lora-plugins plan bigscience/bloomz-7b1 --quantization int8 --memory 24GiB
      lora-plugins plan ./base --r 16 --target-modules all-linear --length 2048
      lora-plugins plan org/base --devices 2 --strategy fsdp --json
    """
    check_hub(adapter, hub)
    from lora_plugins.planning.planner import plan as make_plan

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        made = make_plan(
            model,
            quantization=None if quantization == "none" else quantization,
            batch_size=batch_size,
            length=length,
            gradient_checkpointing=gradient_checkpointing,
            optim=optim,
            devices=devices,
            strategy=strategy,
            memory=memory,
            device=device,
            task=task,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            experts=experts,
            recipe=recipe,
            adapter=None if adapter is None else find_adapter(adapter, hub),
            serve=serve or None,
            **{**({} if r is None else {"r": r}), **_read_targets(target_modules), **_read_fields(lora or [])},
        )
        if chart is not None:
            made.chart(chart)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(made)
    else:
        typer.echo(str(made))


def _read_targets(names: list[str] | None) -> dict[str, Any]:
    """Return ``target_modules`` as in Python: a single scope or pattern as text, module names as a list."""
    from lora_plugins.targets.words import read_words

    return {"target_modules": read_words(names)} if names else {}


def _read_fields(given: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint="--lora")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields
