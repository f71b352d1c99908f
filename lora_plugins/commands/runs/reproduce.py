"""``lora-plugins reproduce``: train a recorded run again."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer

from lora_plugins.commands.hub import HubOption, check_hub

__all__ = ["CONTEXT", "reproduce"]

#: Other flags are those of ``train``.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def reproduce(
    context: typer.Context,
    reference: Annotated[
        str, typer.Argument(help="Adapter: org/name@version, its folder (/… or ./…), or a run's output folder.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Only show what is missing or different here; train nothing.")
    ] = False,
    hub: HubOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, the rest to stderr.")] = False,
) -> None:
    """Train an adapter again with its recorded recipe, and compare the two.

    Flags of `lora-plugins train` after the adapter replace recorded ones, or supply what was not recorded, such as
    --dataset and --model for local files. Exit code: 0 if the adapters are the same, else 1. With --check: 1 if
    anything is missing or different here.

    \b
    Examples:
      lora-plugins reproduce org/name@1.2.0 --check
      lora-plugins reproduce org/name@1.2.0 --dataset train.jsonl
      lora-plugins reproduce ./lora-output --dataset train.jsonl --json
    """
    if reference.startswith("-"):
        raise typer.BadParameter(f"{reference} stands where the adapter is expected; flags of train come after it")
    check_hub(reference, hub)
    # The demo's modules take longer to load than most commands run.
    from lora_plugins.commands.runs import demo
    from lora_plugins.recipe.reproduction import reproduce as again

    result: again.Readiness | again.Reproduction
    # What the repeated run says is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        original = again.read_original(reference, hub)
        if demo.is_demo(original):
            act = demo.check_demo if check else demo.repeat_demo
            result = act(again, original, context.args)
        elif check:
            result = again.check_reproduction(original, context.args)
        else:
            result = again.reproduce(original, context.args)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else "\n".join(result.lines()))
    if not (result.ready if isinstance(result, again.Readiness) else result.same):
        raise typer.Exit(1)
