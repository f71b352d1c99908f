"""``lora-plugins train``: fine-tune a model on a data set."""

from __future__ import annotations

import typer

from lora_plugins.commands.calm import calm

__all__ = ["CONTEXT", "NEEDED", "train"]


#: The command's own parser reads everything, its help included.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


#: Message for a command line without arguments.
NEEDED = """\
lora-plugins train needs a model and a data set:
    lora-plugins train --model org/base --dataset examples.jsonl
The data set has the columns of --template, by default {dialogue} and {summary}; chats take --template chat.
The adapter, the merged model and a report go to --output_dir, by default lora-output/.
All other flags have defaults: `lora-plugins train --help`, --help-all, or --config FILE for a YAML file of them."""


def train(context: typer.Context) -> None:
    """Fine-tune a language model with LoRA: packing, int8, training, merge."""
    calm()
    words = context.args
    if not words:
        typer.echo(NEEDED, err=True)
        raise typer.Exit(2)
    if "--help-all" in words or "--help" in words or "-h" in words:
        from lora_plugins.recipe.parser import make_parser

        typer.echo(make_parser(everything="--help-all" in words).format_help().strip())
        raise typer.Exit
    from lora_plugins.recipe.run import run

    raise typer.Exit(run(words))
