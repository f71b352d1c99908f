"""The library's logger: shown by default, silenced as transformers' is.

``logging.getLogger("lora_plugins").setLevel(logging.WARNING)``, ``LORA_PLUGINS_VERBOSITY=warning``, and
``transformers.logging.set_verbosity_error()`` each silence what is below a warning.
"""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["get_logger", "is_shown"]


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
