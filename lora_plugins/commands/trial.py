"""``lora-plugins try``: write with an adapter on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_plugins.commands.calm import quiet
from lora_plugins.commands.hub import HubOption, find_adapter

if TYPE_CHECKING:
    from lora_plugins.serving.trial import Message, Trial, Writing

__all__ = ["try_"]


def try_(
    adapter: Annotated[str, typer.Argument(help="Adapter: a folder (/… or ./…), or org/name@version in the registry.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt; repeatable. Default is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat: each line is a message, an empty line ends.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the answer without the adapter.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed, the same for base and adapter.")] = 0,
    base: Annotated[str | None, typer.Option(help="Base model; default is the one the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")] = None,
    hub: HubOption = None,
    quantization: Annotated[str | None, typer.Option(help="Backend to quantize the base with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all answers as JSON at the end.")] = False,
) -> None:
    """Generate text with an adapter, and without it for comparison.

    \b
    Examples:
      lora-plugins try org/name@1.2.0 --prompt "Summarize: …" --compare
      lora-plugins try ./demo-output/adapter --chat
      lora-plugins try org/name --prompt "Hello" --temperature 0.8
    """
    if chat and (prompt or as_json):
        raise typer.BadParameter("cannot be combined with --prompt or --json: type the messages", param_hint="--chat")
    if not chat and not prompt and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt, --chat, or a text on standard input", param_hint="--prompt")
    quiet()
    from lora_plugins.serving.trial import Writing, open_trial

    trial = open_trial(find_adapter(adapter, hub), base=base, revision=revision, quantization=quantization)
    writing = Writing(max_new_tokens, temperature, seed, raw)
    if chat:
        _talk(trial, writing, compare=compare)
        return
    texts = prompt or [sys.stdin.read()]
    if as_json:
        typer.echo(json.dumps(_collect(trial, texts, writing, compare=compare), indent=2))
        return
    for text in texts:
        for with_adapter in (True, False) if compare else (True,):
            _answer(trial, _ask(text), writing, with_adapter=with_adapter, named=compare)


def _ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _collect(trial: Trial, texts: list[str], writing: Writing, *, compare: bool) -> dict[str, Any]:
    """Return all answers as JSON values."""
    answers = [
        {
            "prompt": text,
            "adapter": trial.answer(_ask(text), writing),
            **({"base": trial.answer(_ask(text), writing, with_adapter=False)} if compare else {}),
        }
        for text in texts
    ]
    return {"adapter": trial.adapter, "base": trial.base, "answers": answers}


def _talk(trial: Trial, writing: Writing, *, compare: bool) -> None:
    """Answer line after line. Base and adapter remember what they said themselves."""
    said: dict[bool, list[Message]] = {with_adapter: [] for with_adapter in ((True, False) if compare else (True,))}
    for line in _read_lines():
        for with_adapter, messages in said.items():
            messages.append({"role": "user", "content": line})
            answer = _answer(trial, messages, writing, with_adapter=with_adapter, named=compare)
            messages.append({"role": "assistant", "content": answer})


def _read_lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(trial: Trial, messages: list[Message], writing: Writing, *, with_adapter: bool, named: bool) -> str:
    """Print an answer while it is written; ``named`` says first whose it is."""
    if named:
        typer.echo(typer.style(f"{trial.adapter}:" if with_adapter else f"{trial.base} alone:", bold=True))
    answer = trial.answer(messages, writing, with_adapter=with_adapter, say=lambda piece: typer.echo(piece, nl=False))
    typer.echo("\n" if named else "")
    return answer
