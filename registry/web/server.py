"""Serve the pages of a registry on this machine, read-only."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from registry.errors import (
    AddressConflict,
    HubUnavailable,
    InvalidAddress,
    PageNotFound,
    RegistryError,
    RepositoryNotFound,
    VersionNotFound,
)
from registry.hubs import open_hub
from registry.hubs.http.deadline import limit_operation
from registry.hubs.protocol import Hub
from registry.web.site import Moved, Site

__all__ = ["PageServer", "open_server"]

#: Seconds that a page may take with all that is asked of the registry for it.
_PAGE = 60.0
#: Seconds that a browser may take to send its request.
_REQUEST = 10.0
_MOST_CONNECTIONS = 32
_LONGEST_ADDRESS = 2000
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    # The page's own policy says the rest.
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; object-src 'none'",
}

_log = logging.getLogger(__name__)


class PageServer(ThreadingHTTPServer):
    """A server of a registry's pages.

    Args:
        address: Host and port to listen at; port 0 is any free one.
        site: The pages.
        names: Names by which a browser may ask for it, besides those of this machine's loopback.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], site: Site, names: Iterable[str] = ()) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.site, self.host = site, address[0]
        self._slots = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._names = {name.lower() for name in (*_LOCAL_NAMES, _write_host(self.host), *names)}
        super().__init__(address, PageHandler)

    @property
    def address(self) -> str:
        """The address of the first page."""
        return f"http://{_write_host(self.host)}:{self.server_address[1]}/"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return _is_loopback(str(self.server_address[0]))

    def answers_to(self, host: str) -> bool:
        """Whether a request's ``Host`` is one of this server's.

        A page of others whose name was pointed at this machine (DNS rebinding) asks with its own name. An address in
        digits cannot be such a name, so it is one of this server's where other machines may ask.
        """
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        if not name:
            name, port = host, ""
        if port and port != str(self.server_address[1]):
            return False
        return name.lower() in self._names or (not self.loopback and _is_address(name))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless too many are busy."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then let another connection in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a connection; a browser that went away is none."""
        _log.debug("a connection ended early", exc_info=True)

    def server_bind(self) -> None:
        """Listen, without asking a name server for this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name == "posix"))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]


class PageHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer
    timeout = _REQUEST

    def version_string(self) -> str:
        """Return the server's name, without releases."""
        return "lora-plugins"

    def log_message(self, format: str, *values: Any) -> None:
        """Log at level debug only: addresses are written by others."""
        _log.debug(format, *values)

    def end_headers(self) -> None:
        """End the headers of any answer, errors of the protocol among them, with those that keep a browser strict."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self) -> None:
        """Send a page."""
        status, text, address = self._answer()
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        if address:
            self.send_header("Location", address)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_GET

    def _answer(self) -> tuple[HTTPStatus, str, str]:
        """Return status, page, and address of the page if it is elsewhere."""
        refused = self._refuse()
        if refused is not None:
            return refused
        site = self.server.site
        try:
            parts = urlsplit(self.path)
            query = dict(parse_qsl(parts.query))
            with limit_operation(_PAGE):
                return HTTPStatus.OK, site.render(unquote(parts.path)[1:], query), ""
        except Moved as moved:
            return HTTPStatus.SEE_OTHER, self._say("See other", "The page is at another address."), moved.address
        except (PageNotFound, RepositoryNotFound, VersionNotFound) as error:
            return HTTPStatus.NOT_FOUND, self._say("Not found", site.explain(error)), ""
        except HubUnavailable as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, self._say("The registry does not answer", site.explain(error)), ""
        except RegistryError as error:
            return HTTPStatus.BAD_GATEWAY, self._say("The registry cannot be read", site.explain(error)), ""
        except Exception:
            _log.exception("a page could not be made")
            text = "The page cannot be made; the log of the server says why."
            return HTTPStatus.INTERNAL_SERVER_ERROR, self._say("Error", text), ""

    def _refuse(self) -> tuple[HTTPStatus, str, str] | None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.answers_to(hosts[0].strip()):
            text = (
                "This server does not answer to the name that the browser asked for. To allow one: lora-plugins "
                "registry serve --allowed-host NAME"
            )
            # Who asks may be a page of others: it is not told which registry this is.
            return HTTPStatus.MISDIRECTED_REQUEST, f"<!doctype html><title>Unknown host</title><p>{text}</p>", ""
        if self.command not in ("GET", "HEAD"):
            text = "Pages can be read only: GET and HEAD."
            return HTTPStatus.METHOD_NOT_ALLOWED, self._say("Method not allowed", text), ""
        if len(self.path) > _LONGEST_ADDRESS:
            text = f"The address has more than {_LONGEST_ADDRESS:,} characters."
            return HTTPStatus.REQUEST_URI_TOO_LONG, self._say("Address too long", text), ""
        if not self.path.startswith("/"):
            return HTTPStatus.BAD_REQUEST, self._say("Bad request", "The address must begin with /."), ""
        return None

    def _say(self, title: str, text: str) -> str:
        return self.server.site.render_message(title, text)


def open_server(
    hub: Hub | str | os.PathLike[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    allowed_hosts: Iterable[str] = (),
    token: str | bool | None = None,
) -> PageServer:
    """Open a server of a registry's pages; ``serve_forever()`` answers, ``server_close()`` ends it.

    Everybody who can reach it sees what the token may see. Where that may be others than this machine, no page shows
    the path of a registry's folder.

    Args:
        hub: The registry.
        host: Address to listen at, or a name for it, by which browsers may ask then; by default this machine only.
        port: Port; 0 is any free one.
        allowed_hosts: Names by which browsers may ask for it, besides ``localhost``.
        token: For the registry.

    Raises:
        InvalidAddress: Host, port or an allowed name is not valid.
        AddressConflict: The port is taken, or may not be used.
        InvalidReference: ``hub`` is not a registry.
    """
    place, names = open_hub(hub, token), list(allowed_hosts)
    if not 0 <= port <= 65535:
        raise InvalidAddress(f"Port {port} is not valid: it must be 0 to 65535, where 0 is any free one")
    for name in names:
        if not name or any(char in name for char in "/:@ \t") or not name.isprintable():
            raise InvalidAddress(f"{name[:100]!r} is not valid as the name of a host: give it without http:// and port")
    address = _find_address(host)
    # Names of others are for a proxy, which lets other machines in.
    site = Site(place, "Registry", served=True, private=_is_loopback(address) and not names)
    try:
        return PageServer((address, port), site, [*names, host])
    except OSError as error:
        taken = f"Port {port} of {host} cannot be used: {error.strerror or error}"
        raise AddressConflict(f"{taken}. Choose another with --port; --port 0 takes any free one") from error


def _find_address(host: str) -> str:
    """Return the address of a host in digits.

    Raises:
        InvalidAddress: It has none.
    """
    try:
        return str(socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise InvalidAddress(f"Host {host[:100]!r} is not an address of this machine: {error}") from error


def _write_host(address: str) -> str:
    """Return an address as browsers write it."""
    return f"[{address}]" if ":" in address else address


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
