"""``lora-plugins train``: fine-tune a model on a data set."""

from __future__ import annotations

import contextlib
import json
import sys

import typer

__all__ = ["CONTEXT", "EXAMPLES", "NEEDED", "train"]


#: The command's own parser reads everything, its help included.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


#: Message for a command line without arguments.
NEEDED = """\
lora-plugins train needs a model and a data set:
    lora-plugins train --model org/base --dataset examples.jsonl
The data set has the columns of --template, by default {dialogue} and {summary}; chats take --template chat.
The adapter, the merged model and a report go to --output_dir, by default lora-output/.
All other flags have defaults: `lora-plugins train --help`, --help-all, or --config FILE for a YAML file of them."""

#: What stands under the help.
EXAMPLES = """\
Examples:
  lora-plugins train --model org/base --dataset examples.jsonl
  lora-plugins train --model ./base --dataset chats.jsonl --template chat
  lora-plugins train --config run.yaml --resume --json"""


def train(context: typer.Context) -> None:
    """Fine-tune a language model with LoRA, from a data set to the merged model."""
    words = context.args
    if not words:
        typer.echo(NEEDED, err=True)
        raise typer.Exit(2)
    if "--help-all" in words or "--help" in words or "-h" in words:
        from lora_plugins.recipe.parser import make_parser

        typer.echo(f"{make_parser(everything='--help-all' in words).format_help().strip()}\n\n{EXAMPLES}")
        raise typer.Exit
    from lora_plugins.recipe.parser import JSON_FLAG, parse
    from lora_plugins.recipe.run import TrainingRun

    as_json = JSON_FLAG in words
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        training = TrainingRun(*parse([word for word in words if word != JSON_FLAG]))
        code = training.run()
    if as_json and code == 0 and training.is_main:
        typer.echo(json.dumps(training.describe(), indent=2))
    raise typer.Exit(code)
