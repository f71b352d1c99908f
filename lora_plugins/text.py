"""Write suggestions, dtype names, texts on one line, and whole files."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ELSEWHERE",
    "did_you_mean",
    "dtype_name",
    "find_near",
    "forward_names",
    "one_line",
    "private_folder",
    "show_near",
    "suggest_arguments",
    "write_file",
    "write_json",
]

#: What TRL, Axolotl, LLaMA-Factory, Unsloth and bitsandbytes call our arguments; where one is fixed, with its value.
ELSEWHERE: Mapping[str, tuple[str, str | None]] = {
    "rank": ("r", None),
    "lora_r": ("r", None),
    "lora_rank": ("r", None),
    "lora_target": ("target_modules", None),
    "lora_target_linear": ("target_modules", "all-linear"),
    "additional_target": ("modules_to_save", None),
    "load_in_8bit": ("quantization", "int8"),
    "load_in_4bit": ("quantization", "nf4"),
    "quantization_bit": ("quantization", None),
    "bits": ("quantization", None),
    "quant": ("quantization", None),
    "bnb_4bit_quant_type": ("quantization", None),
    "upcast_layernorm": ("upcast", "norms"),
}

#: What other tools put before the names of `peft.LoraConfig`.
_PREFIXES = ("lora_", "peft_")


def find_near(name: object, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names nearest to a wrong one, best first; see `did_you_mean` for the arguments."""
    return difflib.get_close_matches(str(name), list(known), n=most, cutoff=cutoff)


def did_you_mean(
    name: object,
    known: Iterable[str],
    *,
    most: int = 1,
    cutoff: float = 0.6,
    show: Callable[[str], str] = repr,
) -> str:
    """Return a sentence with the known names nearest to a wrong one, beginning with a space; empty if none is near.

    Args:
        name: What was written.
        known: What could have been meant.
        most: Number of names to suggest at most.
        cutoff: Similarity that a name must have, 0 to 1.
        show: How a name is written in the sentence.
    """
    near = find_near(name, known, most=most, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(show, near))}?" if near else ""


def show_near(name: str, near: Iterable[str]) -> str:
    """Return a name that matches nothing, in quotes, with similar ones in brackets if there are any."""
    close = ", ".join(near)
    return f"{name!r} (near: {close})" if close else repr(name)


def suggest_arguments(
    name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6
) -> list[tuple[str, str | None]]:
    """Return arguments that an unknown name may stand for, best first, each with the value that says the same.

    Args:
        name: What was written.
        known: The arguments there are.
        most: Number of arguments at most.
        cutoff: Similarity that a name must have where no other tool calls an argument so, 0 to 1.
    """
    known = list(known)
    if name in ELSEWHERE and ELSEWHERE[name][0] in known:
        return [ELSEWHERE[name]]
    for prefix in _PREFIXES:
        if name.removeprefix(prefix) in known:
            return [(name.removeprefix(prefix), None)]
    return [(near, None) for near in find_near(name, known, most=most, cutoff=cutoff)]


def dtype_name(dtype: object) -> str:
    """Return the name of a torch dtype without its module: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def forward_names(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that hands out names which have moved, with a `DeprecationWarning`.

    Args:
        module: The module where the names were.
        places: For each name, the module where it is now.
    """

    def find_name(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place = places[name]
        warnings.warn(f"Import {name} from {place}; {module}.{name} is deprecated", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), name)

    return find_name


def one_line(text: object) -> str:
    """Return a text, or an error's message, with every run of white space as one space."""
    return " ".join(str(text).split())


@contextlib.contextmanager
def private_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a new folder beside a target, for files that take its place once they are complete; remove it at the end.

    Its name is new and nobody else can write there: what others have put beside the target, such as a link to another
    file, is neither followed nor overwritten.

    Args:
        target: A file or folder. The folder that it is in is made if it is missing.

    Raises:
        OSError: The folder cannot be made.
    """
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}-", dir=place.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file that is complete or not there, in place of the one that was there; a link there is not followed.

    Raises:
        OSError: The folder cannot be written.
    """
    with private_folder(path) as folder:
        written = folder / "file"
        written.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(written, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file as `write_file` does. Values that JSON does not know are written as text.

    Raises:
        OSError: The folder cannot be written.
    """
    write_file(path, json.dumps(value, indent=2, default=str) + "\n")
