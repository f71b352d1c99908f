"""Read target modules that were given as words on a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_plugins.errors import TargetError
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.targets.candidates import SCOPES

__all__ = ["read_words"]


#: Characters that never occur in module names: those of regular expressions, and the hyphen of scopes.
_NOT_IN_NAMES = frozenset("*|()[]^$\\+?-")


def read_words(words: Sequence[str] | None, host: PluginHost | None = None) -> str | list[str] | None:
    """Return ``target_modules`` as the Python interface takes it, by one rule for every command.

    A single word stays a string if it is a scope, built in or of any registered architecture, or a regular
    expression. Everything else is a list of names. A caller that can pass only one string gives the list as JSON,
    which also marks a word that is a scope as a module name.

    Args:
        words: The words; ``None`` or an empty sequence for the architecture's default.
        host: Where scopes are registered; default is the process's plugin host.

    Raises:
        TargetError: A word begins like a JSON list but is not a JSON list of names.
    """
    if not words:
        return None
    if len(words) > 1:
        return list(words)
    word = words[0]
    if word.startswith("["):
        names = _read_list(word)
        if names is not None:
            return names
    known = (*SCOPES, *(host or plugin_host()).scopes())
    return word if word in known or _NOT_IN_NAMES & set(word) else [word]


def _read_list(word: str) -> list[str] | None:
    """Return the names in a JSON list; ``None`` for a regular expression, which may begin with a bracket too."""
    try:
        names = json.loads(word)
    except json.JSONDecodeError as error:
        if word.startswith('["'):
            raise TargetError(f"target_modules={word!r} must be a JSON list of names: {error}") from None
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TargetError(f"target_modules={word!r} must be a JSON list of names")
    return names
