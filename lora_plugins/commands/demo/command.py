"""``lora-plugins demo``: train, publish, pull and reload, offline."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_plugins.commands.demo.run import DemoResult

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a causal language model.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    quantization: Annotated[str, typer.Option(help="Backend of the frozen base, or 'none'.")] = "int8",
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps, eight examples each.")] = 20,
    output: Annotated[Path, typer.Option(help="Folder for adapter, report and loss curve.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed; two runs with the same seed print the same numbers.")] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, the rest to stderr.")] = False,
) -> None:
    """Train an adapter on this machine, compare before and after, publish, pull and reload it. Works offline."""
    from lora_plugins.commands.demo.run import Demo, DemoOptions

    options = DemoOptions(model, None if quantization == "none" else quantization, steps, output, seed)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = Demo(options).run()
    typer.echo(json.dumps(dataclasses.asdict(result), indent=2) if as_json else _format_result(result))


def _format_result(result: DemoResult) -> str:
    lower = 1 - result.perplexity_after / result.perplexity_before
    kernel = f"{result.quantization} base" if result.quantization else "float base"
    lines = [""]
    for sample in result.samples:
        lines += [f"── {sample.module}", sample.source, ""]
        lines += [f"   author: {sample.author}", f"   before: {sample.before}", f"   after:  {sample.after}", ""]
    lines += [
        f"Held-out loss in evaluation mode ({result.held_out_functions} functions, {result.held_out_tokens} tokens):",
        f"   base as loaded, float          {result.loss_float:.4f}",
        f"   before: {kernel}, adapter zero {result.loss_before:.4f}   perplexity {result.perplexity_before:.2f}",
        f"   after:  {kernel} and adapter   {result.loss_after:.4f}   perplexity {result.perplexity_after:.2f}",
        f"   perplexity is {lower:.1%} lower; {result.trainable:,} of {result.total:,} weights were trained",
    ]
    if result.reload is not None:
        lines += [
            "",
            f"Published in a folder as {result.release}, pulled and loaded onto a fresh base in a new process:",
            f"   the base is the one it was trained on: {result.reload.identity}",
            f"   logits bit-equal: {'yes' if result.reload.equal else 'NO'}; "
            f"with the adapter off they differ by {result.reload.difference_off:.2f}",
        ]
    total = sum(result.seconds.values())
    phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in result.seconds.items())
    lines += ["", f"Written: {', '.join(result.files)}", f"{total:.0f} seconds: {phases}"]
    lines += ["", "What to do next:", *(f"   {command:44} {purpose}" for command, purpose in _list_next(result))]
    return "\n".join(lines)


def _list_next(result: DemoResult) -> list[tuple[str, str]]:
    """Return commands that go on from here, each with what it is for."""
    adapter, registry = (next(path for path in result.files if path.endswith(end)) for end in ("adapter", "registry"))
    name = result.release.partition("@")[0]
    return [
        (f"lora-plugins show {name} --hub {registry}", "the release and its figures"),
        (f"lora-plugins try {adapter} --chat", "talk to it"),
        ("lora-plugins train --help", "the same with your data, without code"),
        ("lora-plugins plan MODEL", "whether another model fits on your machine"),
        ("lora-plugins merge --help", "base and adapter as one model"),
    ]
