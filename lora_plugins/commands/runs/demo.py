"""Run a demo again from its recording."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from lora_plugins.commands.demo.model import PACKAGE, demo_model
from lora_plugins.commands.demo.run import Demo, DemoOptions, describe_options
from lora_plugins.errors import ArgumentsError

__all__ = ["check_demo", "is_demo", "repeat_demo"]

#: What the demo records, and what may be given after the adapter.
_RECORDED = ("model", "revision", "steps", "seed", "quantization")
_FLAGS = ("model", "steps", "seed", "quantization")
#: Least values, as `lora-plugins demo` has them.
_LEAST = {"steps": 2, "seed": 0}


def is_demo(original: Any) -> bool:
    """Whether an adapter's recipe is that of a demo."""
    return bool(original.recipe.get("command") == "demo")


def check_demo(again: Any, original: Any, words: Sequence[str]) -> Any:
    """Return what is missing or different here; nothing is trained.

    Args:
        again: The module that repeats runs, which loads torch.
        original: The adapter.
        words: Flags after it.

    Raises:
        typer.BadParameter: The demo has no such flag.
        ReproductionError: The recipe cannot be used.
        ArgumentsError: A value cannot be used.
    """
    given = _read_words(words)
    recorded = again.read_recorded_flags(original, {*given}, _RECORDED, _FLAGS)
    if recorded.missing:
        return again.Readiness(original.name, recorded.missing, unknown=recorded.unknown)
    options = _make_options({**recorded.flags, **given}, Path())
    return again.compare_runs(original, recorded, describe_options(options), _find_base(options))


def repeat_demo(again: Any, original: Any, words: Sequence[str]) -> Any:
    """Run the demo again and return the comparison; see `check_demo`."""
    given = _read_words(words)
    recorded = again.read_recorded_flags(original, {*given}, _RECORDED, _FLAGS)
    recorded.check_complete(original)
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        options = _make_options({**recorded.flags, **given}, Path(folder))
        Demo(options).run()
        here = describe_options(options)
        return again.compare_runs(original, recorded, here, _find_base(options), Path(folder, "adapter"))


def _read_words(words: Sequence[str]) -> dict[str, str]:
    flags = [word.removeprefix("--") for word in words[::2]]
    if len(words) % 2 or not {*flags} <= {*_FLAGS} or not all(word.startswith("--") for word in words[::2]):
        raise typer.BadParameter("the adapter of a demo takes --model, --steps, --seed and --quantization after it")
    return dict(zip(flags, words[1::2], strict=True))


def _make_options(values: Mapping[str, Any], output: Path) -> DemoOptions:
    model, quantization = (str(values[name]) for name in ("model", "quantization"))
    return DemoOptions(
        None if model.startswith(f"{PACKAGE}@") else model,
        None if quantization == "none" else quantization,
        _read_number("steps", values["steps"]),
        output,
        _read_number("seed", values["seed"]),
    )


def _read_number(name: str, value: Any) -> int:
    text = str(value)
    least = _LEAST[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ArgumentsError(f"--{name} must be a whole number of at least {least}, not {text[:200]!r}")
    return int(text)


def _find_base(options: DemoOptions) -> str:
    return options.model or str(demo_model())
