"""``lora-plugins reproduce``: train a recorded run again."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_plugins.commands.calm import calm
from lora_plugins.commands.demo.run import Demo, DemoOptions

__all__ = ["CONTEXT", "reproduce"]

#: Other flags are those of ``train``.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def reproduce(
    context: typer.Context,
    reference: Annotated[
        str, typer.Argument(help="Adapter: org/name@version, its folder as /… or ./…, or a run's output folder.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is missing or other here than it was; train nothing.")
    ] = False,
    hub: Annotated[str | None, typer.Option(help="Registry; default is LORA_REGISTRY.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, the rest to stderr.")] = False,
) -> None:
    """Train an adapter again as it was recorded, and say whether it is the same.

    Flags of `lora-plugins train` after the adapter replace recorded ones, or give what was not recorded, such as
    --dataset and --model for local files. Exit code 0: the same; 1: another one, or with --check something that is
    missing or other here.

    \b
    Examples:
      lora-plugins reproduce org/name@1.2.0 --check
      lora-plugins reproduce org/name@1.2.0 --dataset train.jsonl
      lora-plugins reproduce ./lora-output --model ./base --dataset train.jsonl --json
    """
    if reference.startswith("-"):
        raise typer.BadParameter(f"{reference} stands where the adapter is expected; flags of train come after it")
    calm()
    from lora_plugins.recipe.reproduction import reproduce as again

    result: again.Readiness | again.Reproduction
    # What the repeated run says is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        original = again.read_original(reference, hub)
        recipe = original.lineage.get("recipe")
        if isinstance(recipe, dict) and recipe.get("command") == "demo":
            result = (
                again.compare_runs(original, None) if check else _repeat_demo(again, original, recipe, context.args)
            )
        elif check:
            result = again.check_reproduction(reference, context.args, hub=hub)
        else:
            result = again.reproduce(reference, context.args, hub=hub)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else "\n".join(result.lines()))
    if not (result.ready if isinstance(result, again.Readiness) else result.same):
        raise typer.Exit(1)


def _repeat_demo(again: Any, original: Any, recipe: Mapping[str, Any], words: Sequence[str]) -> Any:
    """Run the demo again; its flags replace recorded ones."""
    flags = [word.removeprefix("--") for word in words[::2]]
    if len(words) % 2 or not {*flags} <= {"model", "steps", "seed", "quantization"}:
        raise typer.BadParameter("the adapter of a demo takes --model, --steps, --seed and --quantization after it")
    given = {**recipe, **dict(zip(flags, words[1::2], strict=True))}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        quantization = None if given.get("quantization") == "none" else str(given.get("quantization"))
        steps, seed = (int(given[name]) for name in ("steps", "seed"))
        Demo(DemoOptions(given.get("model"), quantization, steps, Path(folder), seed)).run()
        return again.compare_runs(original, Path(folder, "adapter"))
