"""Hub errors with tokens and control characters removed.

All text from outside is cleaned first: tokens are masked and control characters removed. Exceptions of the HTTP client
are never stored or chained, because they hold the request and thus the token.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from typing import Any

from registry.disk.machine import lacks_something
from registry.text import visible

__all__ = ["TRANSIENT", "HubFailed", "cleaner", "failure_of", "failure_of_network", "hostile"]

#: Statuses after which the same request may succeed.
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_TEXT = 300
#: X-Error-Code values accepted from a hub. Other codes are internal; with them a hub could pass as being offline.
_CODES = frozenset({"EntryNotFound", "GatedRepo", "RepoNotFound", "RevisionNotFound"})


class HubFailed(Exception):
    """A request to a hub failed, or got an invalid answer; ``registry.hubs.huggingface`` turns it into a public error.

    ``status`` and ``code`` are those of the answer, if there was one (``code`` is the Hub's ``X-Error-Code``).
    ``transient`` says whether the same request may succeed later, and ``wait`` in how many seconds, if the hub said so.
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
    """Make the failure for an answer that violates the protocol or a limit."""
    return HubFailed(reason, code="Hostile")


def failure_of(response: Any, clean: Callable[[str], str]) -> HubFailed:
    """Make the failure for an error response (``response`` has httpx's or requests' interface)."""
    status, headers = int(response.status_code), response.headers
    asked, code = headers.get("Retry-After", ""), headers.get("X-Error-Code")
    return HubFailed(
        clean(f"HTTP {status} {headers.get('X-Error-Message', '')}"),
        status=status,
        code=code if code in _CODES else None,
        transient=status in TRANSIENT,
        wait=float(asked) if asked.isdigit() and len(asked) < 12 else None,
    )


def failure_of_network(error: BaseException, clean: Callable[[str], str]) -> HubFailed:
    """Make the failure for an exception of the HTTP client; certificate and machine errors are not transient."""
    reason = clean(f"{type(error).__name__}: {error}")
    if _find(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return HubFailed(
            f"its certificate is not trusted ({reason}). If an authority of your own has signed it, set SSL_CERT_FILE "
            "to the file with that authority's certificate (REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE are read, too)",
            code="Certificate",
        )
    lacking = lacks_something(error)
    if lacking is not None:
        return HubFailed(f"this machine cannot connect: {lacking.strerror}", code="Machine")
    return HubFailed(reason, transient=True)


def _find(error: BaseException, kind: type[BaseException]) -> bool:
    chain: BaseException | None = error
    for _ in range(20):
        if chain is None or isinstance(chain, kind):
            break
        chain = chain.__cause__ or chain.__context__
    return isinstance(chain, kind)


def cleaner(secrets: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """Return a function that cleans text from outside: one line, no control characters, none of ``secrets``."""

    def clean(text: str) -> str:
        for secret in secrets():
            text = text.replace(secret, "***")
        return visible(text, _LONGEST_TEXT)

    return clean
