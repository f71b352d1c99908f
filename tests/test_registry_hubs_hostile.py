"""Hubs that answer without end, compressed, for ever, or with the token that they were sent."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hubs import LoopbackPlace
from places import fetch, use_own_folders
from releases import NAME, release

from registry.catalog.listing import list_adapters, show, versions
from registry.errors import HubError, HubUnavailable, RegistryError, StaleWarning
from registry.hubs.client import Repositories, Secret
from registry.hubs.http import reading
from registry.hubs.http.deadline import Deadline, limit_operation
from registry.hubs.http.failures import HubFailed
from registry.hubs.huggingface import HuggingFaceHub
from registry.pulling.pull import pull_adapter
from registry.testing import LoopbackHub
from registry.upkeep.verification import verify


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_folders(tmp_path, monkeypatch)


@pytest.fixture
def place(loopback_hub: LoopbackHub) -> LoopbackPlace:
    place = LoopbackPlace(loopback_hub, timeout=2)
    release(place.hub, "1.0.0")
    return place


# -- without end ---------------------------------------------------------------------------------------------------


def serve(listener: socket.socket, head: bytes, body: Callable[[], Iterator[bytes]], sent: list[int]) -> None:
    """Answer every request of every connection in the same way, counting the bytes that are taken."""

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                connection.sendall(head)
                for part in body():
                    sent[0] += connection.send(part)
            except OSError:
                return

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def endless() -> Iterator[bytes]:
    while True:
        yield b" " * 1_000_000


@functools.cache
def compress_bomb() -> bytes:
    return gzip.compress(b" " * 200_000_000, 1)


def bomb() -> Iterator[bytes]:
    yield compress_bomb()


@pytest.fixture
def hostile(request: pytest.FixtureRequest, loopback_hub: LoopbackHub) -> Iterator[tuple[Repositories, list[int]]]:
    """A hub whose every answer goes on, and the bytes that were taken of them."""
    head, body = request.param
    # Compressing takes a second or more, which must not count as an answer that goes on.
    compress_bomb()
    sent = [0]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, head, body, sent), daemon=True).start()
        yield Repositories(f"http://127.0.0.1:{listener.getsockname()[1]}", Secret("hf_x"), 2), sent


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
ENDLESS, GZIP = (_HEAD + b"\r\n", endless), (_HEAD + b"Content-Encoding: gzip\r\n\r\n", bomb)
WRITES: list[Callable[[Repositories], object]] = [
    lambda hub: hub.create("org/a", private=None),
    lambda hub: hub.commit("org/a", "main", {"x": b"1"}, parent="a" * 40, message="m"),
    lambda hub: hub.tag("org/a", "v1", "a" * 40),
    lambda hub: hub.branch("org/a", "b", "a" * 40),
    lambda hub: hub.propose("org/a", {"x": b"1"}, parent="a" * 40, message="m"),
    lambda hub: hub.refs("org/a"),
    lambda hub: hub.files("org/a", "main"),
    lambda hub: hub.content("org/a", "main", "x", 1000),
]


@pytest.mark.parametrize("call", range(len(WRITES)))
@pytest.mark.parametrize("hostile", [ENDLESS, GZIP], indirect=True, ids=["endless", "gzip"])
def test_answers_have_a_limit_while_they_stream(hostile: tuple[Repositories, list[int]], call: int) -> None:
    hub, sent = hostile
    started = time.monotonic()
    with pytest.raises(HubFailed):
        WRITES[call](hub)
    assert time.monotonic() - started < 10
    time.sleep(0.3)
    taken = sent[0]
    time.sleep(0.5)
    assert sent[0] == taken, "a call that was given up goes on reading"
    assert taken < 300_000_000


def test_a_listing_that_never_ends_has_one_deadline(place: LoopbackPlace) -> None:
    endpoint = place.loopback.endpoint
    for route, path in (("tree", f"/api/models/{NAME}/tree/main"), ("list_models", "/api/models")):
        link = f'<{endpoint}{path}?page=next>; rel="next"'
        # The wait is first, for the answer ends the handling of a request: a fast machine would come to the last page.
        place.loopback.faults.slow(route, 0.2, times=None)
        place.loopback.faults.answer(route, b"[]", times=None, Link=link)
    started = time.monotonic()
    with pytest.raises(HubError):
        verify(NAME, hub=place.hub)
    with pytest.raises(HubError):
        list(list_adapters(hub=place.hub))
    assert time.monotonic() - started < 12


def test_a_listing_that_never_ends_is_given_up_after_its_last_page(
    place: LoopbackPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MAX_PAGES", 5)
    path = f"/api/models/{NAME}/tree/main"
    link = f'<{place.loopback.endpoint}{path}?page=next>; rel="next"'
    place.loopback.faults.answer("tree", b"[]", times=None, Link=link)
    (problem,) = verify(NAME, hub=place.hub).problems
    assert "does not end after 5 pages" in problem


def test_an_operation_has_one_deadline_for_all_its_calls() -> None:
    with limit_operation(0.2):
        first = Deadline(60)
        with limit_operation(60):
            time.sleep(0.25)
            assert first.passed
            assert Deadline(60).passed
        first.allow(100_000)
        assert not Deadline(60).passed
    assert not Deadline(60).passed


def test_a_hub_cannot_pass_for_one_that_is_offline(place: LoopbackPlace) -> None:
    """What is offline is taken from the cache without a warning."""
    fetch(place)
    for code in ("Offline", "Hostile", "Machine", "Certificate"):
        place.loopback.faults.status("refs", 400, headers={"X-Error-Code": code})
        with pytest.raises(HubError) as caught:
            fetch(place)
        assert type(caught.value) is HubError
        place.loopback.faults.clear()
    place.loopback.faults.status("refs", 503, times=None, headers={"X-Error-Code": "Offline"})
    with pytest.warns(StaleWarning):
        fetch(place)


def frames_of(error: BaseException) -> str:
    """All local variables of this package's and its libraries' frames, as printers of tracebacks show them."""
    texts: list[str] = []
    chain: BaseException | None = error
    while chain is not None:
        for frame, _ in traceback.walk_tb(chain.__traceback__):
            if frame.f_code.co_filename != __file__:
                texts += traceback.FrameSummary("", 0, "", locals=frame.f_locals).locals.values()  # type: ignore[union-attr]
        texts += [str(chain), repr(chain), repr(vars(chain))]
        chain = chain.__cause__ or chain.__context__
    return "\n".join(texts)


def ask(call: Callable[[], object]) -> str:
    """What a call returns, or everything that its error leads to."""
    try:
        return repr(call())
    except RegistryError as error:
        return frames_of(error)


# -- secrets -------------------------------------------------------------------------------------------------------


def echo(place: LoopbackPlace) -> dict[str, Callable[[], None]]:
    """Ways in which a hub repeats the token."""
    faults, token = place.loopback.faults, place.loopback.token
    commit = place.hub.refs(NAME).tags["v1.0.0"]
    refs = {"branches": [{"name": token, "targetCommit": commit}, {"name": "main", "targetCommit": commit}],
            "tags": [{"name": "v1.0.0", "targetCommit": commit}]}  # fmt: skip
    escaped = json.dumps(refs).replace(token, "".join(f"\\u{ord(char):04x}" for char in token))
    return {
        "a path": lambda: faults.hostile_listing({token: b"x", f"{token}.py": b"y"}),
        "a branch": lambda: faults.answer("refs", json.dumps(refs).encode(), times=None),
        "a branch in escapes": lambda: faults.answer("refs", escaped.encode(), times=None),
        "an identity": lambda: faults.answer("info", json.dumps({"_id": token}).encode(), times=None),
        "a header": lambda: faults.status(
            "refs", 400, times=None, headers={"X-Other": token, "X-Error-Message": token}
        ),
        "a redirect": lambda: faults.status("refs", 302, times=None, headers={"Location": f"http://{token}.invalid/"}),
        "a redirect's scheme": lambda: faults.status("refs", 302, times=None, headers={"Location": f"{token}://x/"}),
        "an error code": lambda: faults.status("refs", 400, times=None, headers={"X-Error-Code": token}),
    }


WAYS = ["a path", "a branch", "a branch in escapes", "an identity", "a header", "a redirect", "a redirect's scheme",
        "an error code"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_a_hub_repeats_appears_nowhere(
    place: LoopbackPlace, way: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    token = place.loopback.token
    ways = echo(place)
    assert sorted(ways) == sorted(WAYS)
    caplog.set_level(logging.DEBUG)
    ways[way]()
    texts = [
        ask(lambda: fetch(place)),
        ask(lambda: verify(NAME, hub=place.hub)),
        ask(lambda: versions(NAME, hub=place.hub)),
    ]
    texts += [caplog.text, *(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())]
    assert not any(token in text for text in texts)
    assert caplog.records


def test_no_frame_of_ours_holds_the_token(place: LoopbackPlace) -> None:
    """Printers of tracebacks show local variables."""
    location, token = place.hub.location, place.loopback.token
    place.loopback.faults.status("*", 403, times=None)
    calls: list[Callable[..., Any]] = [
        lambda secret: pull_adapter(NAME, hub=location, token=secret()),
        lambda secret: verify(NAME, hub=location, token=secret()),
        lambda secret: versions(NAME, hub=location, token=secret()),
        lambda secret: show(NAME, hub=location, token=secret()),
        lambda secret: list(list_adapters(hub=location, token=secret())),
        lambda secret: HuggingFaceHub("ftp://nowhere", secret()),
    ]
    for call in calls:
        with pytest.raises(RegistryError) as caught:
            call(lambda: place.loopback.token)
        assert token not in frames_of(caught.value)


def test_the_implicit_token_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, loopback_hub: LoopbackHub) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", loopback_hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)

    def sent(token: bool | None) -> bool:
        loopback_hub.requests.clear()
        with pytest.raises(RegistryError):
            HuggingFaceHub(None, token).refs("org/nothing")
        return any(request.authorized for request in loopback_hub.requests)

    assert sent(None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert not sent(None)
    assert sent(True)


# -- certificates --------------------------------------------------------------------------------------------------


def test_a_certificate_that_nobody_trusts_is_not_tried_again(tmp_path: Path) -> None:
    """A hub behind an authority of a company's own."""
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "cert", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    tried = [0]

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                answer(listener.accept()[0])

    def answer(connection: socket.socket) -> None:
        tried[0] += 1
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)
            body = b'{"branches": [], "tags": []}'
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)

    script = (
        "import sys; from registry.hubs.client import Repositories, Secret\n"
        "try:\n    Repositories(sys.argv[1], Secret(None), 20).refs('org/a'); print('trusted')\n"
        "except Exception as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        address = f"https://localhost:{listener.getsockname()[1]}"

        def ask(**variables: str) -> str:
            import os

            known = {key: value for key, value in os.environ.items() if "SSL_CERT" not in key and "BUNDLE" not in key}
            environment = {**known, "HF_HUB_OFFLINE": "0", "NO_PROXY": "localhost", **variables}
            done = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=60,
                                  env=environment, check=True)  # fmt: skip
            return done.stdout

        assert "set SSL_CERT_FILE" in ask()
        assert tried[0] == 1
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            assert ask(**{variable: str(tmp_path / "cert")}) == "trusted\n"


def test_a_machine_without_open_files_does_not_hand_out_an_old_version(
    place: LoopbackPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(place)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="Too many open files") as caught:
            fetch(place)
    assert not isinstance(caught.value, HubUnavailable)
