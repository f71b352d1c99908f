"""``lora-plugins train``: fine-tune a model on a data set."""

from __future__ import annotations

import typer

from lora_plugins.commands.calm import calm

__all__ = ["CONTEXT", "train"]


#: The command's own parser reads everything, its help included.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Fine-tune a language model with LoRA: packing, int8, training, merge."""
    calm()
    words = context.args
    if "--help-all" in words or "--help" in words or "-h" in words or not words:
        from lora_plugins.recipe.parser import make_parser

        typer.echo(make_parser(everything="--help-all" in words).format_help().strip())
        raise typer.Exit(0 if words else 2)
    from lora_plugins.recipe.run import run

    raise typer.Exit(run(words))
