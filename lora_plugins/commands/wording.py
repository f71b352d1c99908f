"""Messages in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["find_options", "use_option_names"]

_VALUE = r"""True|False|None|'[^'\n]*'|"[^"\n]*"|\[[^\]\n]*\]|…|[\w./@][\w./@:-]*(?<![.:])"""


def find_options(command: Any) -> dict[str, tuple[str, str | None]]:
    """Return the options of a command: name of the parameter to its flag, and to the flag that switches it off.

    Args:
        command: A click command; ``None`` for no command, which has no options.
    """
    options = (parameter for parameter in getattr(command, "params", ()) if parameter.param_type_name == "option")
    return {
        str(option.name): (max(option.opts, key=len), max(option.secondary_opts, key=len, default=None))
        for option in options
    }


def use_option_names(text: str, options: Mapping[str, tuple[str, str | None]]) -> str:
    """Return a message with keyword arguments written as the options of the command that was called.

    The libraries' messages are written for calls in Python, ``pass force=True``; an argument that is no option of the
    command is left as it is.

    Args:
        text: The message.
        options: As `find_options` returns them.
    """
    if not options:
        return text
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    written = re.compile(rf"(?<![\w.(\-])({names})=({_VALUE})?( \(--[\w-]+( [^()\n]+)?\))?")
    return written.sub(lambda found: _write_option(*options[found[1]], found[2]), text)


def _write_option(flag: str, off: str | None, value: str | None) -> str:
    if value in ("False", "None"):
        return off or f"no {flag}"
    if value is None or value == "True":
        return flag
    return f"{flag} {value.strip(chr(39) + chr(34))}"
