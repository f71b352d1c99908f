"""A token that is sent to its hub but never shown, logged or pickled."""

from __future__ import annotations

import logging
import weakref
from typing import Any

__all__ = ["Secret", "hide_in_logs"]

#: Libraries that log what they send and receive; a hub can repeat a token in its answers.
_LOGGERS = ("hf_xet", "hpack", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


class Secret:
    """A token whose representation does not reveal it."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        if token:
            _KNOWN.add(self)

    def __repr__(self) -> str:
        return "Secret(***)" if self._token else "Secret(none)"

    def __reduce__(self) -> str:
        raise TypeError("a token is not pickled; make the hub anew in the other process")

    def reveal(self) -> str | None:
        """Return the token."""
        return self._token

    def values(self) -> list[str]:
        """Return the texts that must not be shown."""
        return [self._token] if self._token else []

    def authorize(self, request: Any) -> Any:
        """Add the token to a request (httpx calls this for its ``auth=``)."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


_KNOWN: weakref.WeakSet[Secret] = weakref.WeakSet()


class _Blot(logging.Filter):
    """Masks every token in use in the messages of a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mask tokens in a record; every record is logged."""
        text = record.getMessage()
        clean = text
        for secret in list(_KNOWN):
            for value in secret.values():
                clean = clean.replace(value, "***")
        if clean != text:
            record.msg, record.args = clean, ()
        return True


_BLOT = _Blot()


def hide_in_logs() -> None:
    """Mask tokens in the logs of HTTP libraries at every level; each existing logger gets the filter once."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(_LOGGERS):
            logging.getLogger(name).addFilter(_BLOT)
