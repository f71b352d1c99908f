"""The library's logger: shown by default, silenced as transformers' is.

``logging.getLogger("lora_plugins").setLevel(logging.WARNING)``, ``LORA_PLUGINS_VERBOSITY=warning``, and
``transformers.logging.set_verbosity_error()`` each silence what is below a warning.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable

__all__ = ["get_logger", "is_shown", "say_once"]


class _Once(logging.Filter):
    """Lets each message through the first time only."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        message = record.getMessage()
        first = message not in self._said
        self._said.add(message)
        return first


_ONCE = _Once()


class _Output(logging.Handler):
    """Writes to what ``sys.stdout`` is at the time: notebooks and tests exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.write(self.format(record) + "\n")
        sys.stdout.flush()


def get_logger() -> logging.Logger:
    """Return the library's logger, with a handler unless the program has set one up."""
    logger = logging.getLogger("lora_plugins")
    if not logger.handlers:
        logger.addHandler(_Output())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        level = logging.getLevelName(os.environ.get("LORA_PLUGINS_VERBOSITY", "info").upper())
        logger.setLevel(level if isinstance(level, int) else logging.INFO)
    if not any(filter_ is _follow_transformers for filter_ in logger.filters):
        logger.addFilter(_follow_transformers)
    return logger


def _follow_transformers(record: logging.LogRecord) -> bool:
    """Whether a record is shown: information is not while transformers shows errors only."""
    return record.levelno >= logging.WARNING or logging.getLogger("transformers").getEffectiveLevel() < logging.ERROR


def is_shown(level: int = logging.INFO) -> bool:
    """Whether messages of a level are shown."""
    logger = get_logger()
    return logger.isEnabledFor(level) and _follow_transformers(logger.makeRecord("", level, "", 0, "", (), None))


def say_once(names: Iterable[str]) -> None:
    """Let libraries repeat nothing: each message of their loggers is shown once in this process.

    bitsandbytes (0.50) warns about the dtype of the input in every layer of every forward pass. Errors are repeated.

    Args:
        names: Names of loggers; those below them are meant too, as far as they exist by now.
    """
    above = tuple(names)
    for name in list(logging.Logger.manager.loggerDict):
        if any(name == one or name.startswith(f"{one}.") for one in above):
            logger = logging.getLogger(name)
            if _ONCE not in logger.filters:
                logger.addFilter(_ONCE)
