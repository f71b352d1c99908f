"""Decide where a hub may redirect a download to."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

__all__ = ["RefusedRedirect", "next_url", "same_origin"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_DEFAULT_PORTS = {"http": 80, "https": 443}


class RefusedRedirect(Exception):
    """A redirect that is not followed; the message says to where and why."""


def same_origin(one: str, other: str) -> bool:
    """Whether two addresses are the same scheme, host and port: only then may a token for one go to the other.

    Raises:
        ValueError: one of them is no address.
    """
    return _read_origin(urlsplit(one)) == _read_origin(urlsplit(other))


def next_url(endpoint: str, url: str, location: str) -> str:
    """The address that a redirect at ``url`` leads to, if a hub at ``endpoint`` may lead there.

    A hub on the open network has no business with addresses of this machine or of the local network (cloud metadata
    services among them), and one that is reached by https has none with plain http.

    Raises:
        RefusedRedirect: it may not.
    """
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        elsewhere = not same_origin(endpoint, target)
    except ValueError:
        raise RefusedRedirect("a redirect to a malformed address is not followed") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise RefusedRedirect(f"a redirect to {_show_address(parts)} is not followed: only http and https are")
    if urlsplit(endpoint).scheme == "https" and parts.scheme != "https":
        raise RefusedRedirect(f"a redirect from https to {_show_address(parts)} is not followed")
    if elsewhere:
        _check_address(urlsplit(endpoint).hostname or "", parts)
    return target


def _check_address(own_host: str, parts: SplitResult) -> None:
    for address in _resolve_addresses(parts.hostname or ""):
        if address.is_link_local:
            raise RefusedRedirect(f"a redirect to {_show_address(parts)} is not followed: {address} is link-local")
        if not address.is_global and all(own.is_global for own in _resolve_addresses(own_host)):
            raise RefusedRedirect(
                f"a redirect to {_show_address(parts)} is not followed: {address} is not a public address"
            )


def _resolve_addresses(host: str) -> tuple[_Address, ...]:
    """The addresses of a host; none if the name can't be resolved here (a proxy may be able to)."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)


def _read_origin(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _show_address(parts: SplitResult) -> str:
    # Without path and query: signed addresses are secrets.
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
