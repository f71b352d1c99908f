"""Requests, answers and the HTTP/1.1 loop of the loopback Hub."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

__all__ = ["Application", "HubFailure", "Request", "Response", "Server", "User", "failure"]

#: A function that answers a request; ``Request.server`` names the server that got it.
Application = Callable[["Request"], "Response"]


class HubFailure(Exception):
    """An answer other than success: the status, and the headers by which clients recognise the error."""

    def __init__(self, status: int, message: str, code: str | None = None, extra: Mapping[str, object] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = dict(extra or {})
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class User:
    """An account: its token, the organizations it may write to, and whether its token may write at all."""

    name: str
    token: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        """Whether this user's token can change repositories of ``namespace``."""
        return self.role == "write" and self.belongs_to(namespace)

    def belongs_to(self, namespace: str) -> bool:
        """Whether ``namespace`` is the user itself or one of its organizations."""
        return namespace == self.name or namespace in self.orgs


@dataclass
class Request:
    """One request as the routes see it."""

    method: str
    target: str
    headers: Message[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    #: ``"hub"``, or ``"storage"`` for the second origin, to which downloads are redirected.
    server: str
    #: Set by routing: the route's name, the parts of the path, and the sender.
    route: str = "unknown"
    parts: dict[str, str] = field(default_factory=dict)
    user: User | None = None

    @property
    def path(self) -> str:
        """The path as sent, still quoted."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query parameters; of a repeated name, the last one."""
        parsed = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[-1] for name, values in parsed.items()}

    def json(self) -> dict[str, object]:
        """Return the body as a JSON object."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            raise HubFailure(400, "The request body is not JSON") from None
        if not isinstance(value, dict):
            raise HubFailure(400, "The request body is not a JSON object")
        return value


@dataclass
class Response:
    """One answer, and the faults of its delivery."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    #: Close the connection without a byte of an answer.
    drop: bool = False
    #: Send only so many bytes of the body, under the full Content-Length.
    cut_at: int | None = None
    #: Seconds between the bytes of the body.
    drip: float = 0.0

    @classmethod
    def of(cls, value: object, status: int = 200, **headers: str) -> Response:
        """Return an answer with ``value`` as JSON."""
        body = json.dumps(value).encode()
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **sent})


def failure(error: HubFailure) -> Response:
    """Return the answer by which clients recognise ``error``."""
    answer = Response.of({"error": error.message, **error.extra}, error.status)
    answer.headers.update(error.headers)
    answer.headers["X-Error-Message"] = error.message.encode("ascii", "replace").decode().replace("\n", " ")
    if error.code is not None:
        answer.headers["X-Error-Code"] = error.code
    return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written separately; with Nagle's algorithm the second write waits for a delayed ACK.
    disable_nagle_algorithm = True
    server: Server

    def _serve(self) -> None:
        request = Request(self.command, self.path, self.headers, self._read_body(), self.server.name)
        response = self.server.application(request)
        if response.drop:
            self._drop()
            return
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write_body(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            return b"".join(self._read_chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _read_chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass

    def _write_body(self, response: Response) -> None:
        body = response.body if response.cut_at is None else response.body[: response.cut_at]
        if response.drip:
            for position in range(len(body)):
                self.wfile.write(body[position : position + 1])
                time.sleep(response.drip)
        else:
            self.wfile.write(body)
        if response.cut_at is not None:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        # shutdown, not close: the socket's file objects would keep a closed one open.
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: ``LoopbackHub.requests`` is the log."""


class Server(ThreadingHTTPServer):
    """One listening socket on loopback; every connection has a thread of its own."""

    daemon_threads = True
    # Racing clients connect at once; the default backlog of 5 makes some of them wait a second.
    request_queue_size = 128

    def __init__(self, name: str, application: Application, host: str, port: int = 0) -> None:
        self.name = name
        self.application = application
        self.host = host
        # Listen where clients try first: localhost is ::1 on some systems, 127.0.0.1 on others.
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for number, (family, _, _, _, address) in enumerate(addresses, 1):
            self.address_family = family
            try:
                super().__init__((str(address[0]), int(address[1])), _Handler)
                break
            except OSError:
                if number == len(addresses):
                    raise

    @property
    def origin(self) -> str:
        """``http://<host>:<port>``."""
        return f"http://{self.host}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: tests make clients hang up (or be killed) in the middle of a request."""
