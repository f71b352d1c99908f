"""Decide where a hub may redirect a download to."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

__all__ = ["RefusedRedirect", "next_url", "same_origin"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_DEFAULT_PORTS = {"http": 80, "https": 443}


class RefusedRedirect(Exception):
    """A redirect is not followed; the message says where it leads and why."""


def same_origin(one: str, other: str) -> bool:
    """Whether two addresses have the same scheme, host and port: only then may a token for one be sent to the other.

    Raises:
        ValueError: One of them is malformed.
    """
    return _read_origin(urlsplit(one)) == _read_origin(urlsplit(other))


def next_url(endpoint: str, url: str, location: str) -> str:
    """Return the target of a redirect at ``url``, if a hub at ``endpoint`` may redirect there.

    A public hub may not redirect to addresses of this machine or the local network (cloud metadata services among
    them), and an https hub may not redirect to http.

    Raises:
        RefusedRedirect: It may not.
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
    """Return the IP addresses of a host; empty if the name cannot be resolved here (a proxy may resolve it)."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)


def _read_origin(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _show_address(parts: SplitResult) -> str:
    # Omit path and query, because signed URLs are secrets.
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
