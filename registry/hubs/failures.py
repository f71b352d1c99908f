"""What went wrong at a hub, told without anything that must not be shown.

Every text that comes from outside is cleaned first: tokens are blotted out, control characters removed. Exceptions of
the HTTP client are never kept or chained, because they hold the request and that holds the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from registry.text import visible

__all__ = ["TRANSIENT", "HubFailed", "cleaner", "failure_of", "hostile"]

#: Statuses after which the same request may well succeed.
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_TEXT = 300


class HubFailed(Exception):
    """A request that a hub did not fulfil, or not as it should; ``registry.hubs.client`` gives it a public name.

    ``status`` and ``code`` are those of the answer, if there was one (``code`` is the Hub's ``X-Error-Code``).
    ``transient`` says whether the same request may succeed later, ``wait`` in how many seconds, if the hub said so.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        code: str | None = None,
        transient: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code
        self.transient = transient
        self.wait = wait


def hostile(reason: str) -> HubFailed:
    """An answer that no well-meaning, healthy hub gives."""
    return HubFailed(reason, code="Hostile")


def failure_of(response: Any, clean: Callable[[str], str]) -> HubFailed:
    """What an answer other than success means (``response`` has httpx's or requests' interface)."""
    status, headers = int(response.status_code), response.headers
    asked = headers.get("Retry-After", "")
    return HubFailed(
        clean(f"HTTP {status} {headers.get('X-Error-Message', '')}"),
        status=status,
        code=headers.get("X-Error-Code"),
        transient=status in TRANSIENT,
        wait=float(asked) if asked.isdigit() and len(asked) < 12 else None,
    )


def cleaner(secrets: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """A function that makes text from outside fit to be shown: one line, no control characters, none of ``secrets``."""

    def clean(text: str) -> str:
        for secret in secrets():
            text = text.replace(secret, "***")
        return visible(text, _LONGEST_TEXT)

    return clean
