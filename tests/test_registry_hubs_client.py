"""What goes over the wire between this package and a hub: time limits, redirects, retries, secrets, xet."""

from __future__ import annotations

import io
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from versions import needs

from registry.hubs.client import Repositories, Secret
from registry.hubs.http.deadline import Deadline, call_within
from registry.hubs.http.failures import HubFailed, cleaner
from registry.hubs.http.redirects import RefusedRedirect, next_url, same_origin
from registry.testing import LoopbackHub

WEIGHTS = os.urandom(200_000)


@pytest.fixture
def client(loopback_hub: LoopbackHub) -> Repositories:
    loopback_hub.create_repo("org/a")
    loopback_hub.commit("org/a", {"README.md": b"card", "a.safetensors": WEIGHTS})
    return Repositories(loopback_hub.endpoint, Secret(loopback_hub.token), timeout=3)


@pytest.fixture
def head(client: Repositories) -> str:
    return client.refs("org/a")[0]["main"]


def failure(call: Callable[[], object]) -> HubFailed:
    with pytest.raises(HubFailed) as caught:
        call()
    return caught.value


def download(client: Repositories, limit: int = 10**6) -> bytes:
    sink = io.BytesIO()
    client.download("org/a", "main", "a.safetensors", sink, limit)
    return sink.getvalue()


# -- reading -------------------------------------------------------------------------------------------------------


def test_listing_and_content(client: Repositories, loopback_hub: LoopbackHub) -> None:
    loopback_hub.set_page_size(2)
    files = client.files("org/a", "main")
    assert sorted(files) == [".gitattributes", "README.md", "a.safetensors"]
    assert (files["a.safetensors"].size, files["README.md"].sha256) == (len(WEIGHTS), None)
    assert client.content("org/a", "main", "README.md", 4) == b"card"
    assert download(client) == WEIGHTS
    assert loopback_hub.leaks() == []


def test_names_are_quoted(client: Repositories, loopback_hub: LoopbackHub) -> None:
    loopback_hub.commit("org/a", {"a folder/50% #1?.txt": b"x"}, branch="line/1.x")
    assert client.content("org/a", "line/1.x", "a folder/50% #1?.txt", 10) == b"x"


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        (lambda client: client.refs("org/nothing"), 404, "RepoNotFound"),
        (lambda client: client.files("org/a", "v9"), 404, "RevisionNotFound"),
        (lambda client: client.content("org/a", "main", "no", 10), 404, "EntryNotFound"),
        (lambda client: client.create("others/x", private=None), 403, None),
    ],
)
def test_refusals_keep_status_and_code(
    client: Repositories, call: Callable[[Repositories], object], status: int, code: str | None
) -> None:
    refused = failure(lambda: call(client))
    assert (refused.status, refused.code, refused.transient) == (status, code, False)


def test_size_limit_holds_while_bytes_arrive(client: Repositories, loopback_hub: LoopbackHub) -> None:
    assert "more than the 1000 bytes" in str(failure(lambda: download(client, 1000)))
    loopback_hub.faults.replace("README.md", b"x" * 10_000)
    assert failure(lambda: client.content("org/a", "main", "README.md", 4)).code == "Hostile"


def test_broken_download_goes_on_where_it_stopped(client: Repositories, loopback_hub: LoopbackHub) -> None:
    loopback_hub.faults.truncate("*.safetensors", times=2)
    assert download(client) == WEIGHTS
    asked = [served.status for served in loopback_hub.requests if served.route == "storage"]
    assert asked == [200, 206, 206]


def test_download_starts_again_where_the_hub_ignores_ranges(client: Repositories, loopback_hub: LoopbackHub) -> None:
    loopback_hub.faults.truncate("*.safetensors", times=1)
    loopback_hub.faults.call_before("storage", lambda request: request.headers.__delitem__("Range"))
    assert download(client) == WEIGHTS


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1", b"[" * 100_000, b"[]", b'{"branches": [1], "tags": []}'])
def test_answers_that_make_no_sense(client: Repositories, loopback_hub: LoopbackHub, body: bytes) -> None:
    loopback_hub.faults.answer("refs", body)
    assert failure(lambda: client.refs("org/a")).code == "Hostile"


def test_endless_listing_ends(client: Repositories, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.hubs.http.reading._MAX_PAGES", 10)
    link = f'<{loopback_hub.endpoint}/api/models/org/a/tree/main>; rel="next"'
    loopback_hub.faults.answer("tree", b"[]", times=None, Link=link)
    assert "does not end" in str(failure(lambda: client.files("org/a", "main")))
    loopback_hub.faults.clear()
    loopback_hub.faults.answer("tree", b"[]", Link=f'<{loopback_hub.storage_origin}/x>; rel="next"')
    assert "another host" in str(failure(lambda: client.files("org/a", "main")))


# -- time ----------------------------------------------------------------------------------------------------------


def within(seconds: float, call: Callable[[], object]) -> HubFailed:
    start = time.monotonic()
    failed = failure(call)
    assert time.monotonic() - start < seconds
    return failed


def test_storm_of_5xx_ends_at_the_deadline(client: Repositories, loopback_hub: LoopbackHub, head: str) -> None:
    """The stock client alone tries for 23 seconds; reading again what was written may take the time once more."""
    loopback_hub.faults.status("*", 503, times=None)
    assert within(3.5, lambda: client.refs("org/a")).status == 503
    assert within(7, lambda: client.commit("org/a", "main", {"x": b"1"}, parent=head, message="m")).transient


def test_transient_refusals_are_tried_again(client: Repositories, loopback_hub: LoopbackHub, head: str) -> None:
    loopback_hub.faults.status("refs", 503, times=2)
    loopback_hub.faults.status("commit", 503)
    loopback_hub.faults.refuse_connection("tag")
    assert client.refs("org/a")[0] == {"main": head}
    made = client.commit("org/a", "main", {"x": b"1"}, parent=head, message="m")
    client.tag("org/a", "v1", made)
    assert loopback_hub.repo("org/a").tags == {"v1": made}


def test_the_wait_that_a_hub_asks_for_is_kept_if_there_is_time(client: Repositories, loopback_hub: LoopbackHub) -> None:
    loopback_hub.faults.status("refs", 429, headers={"Retry-After": "1"})
    start = time.monotonic()
    client.refs("org/a")
    assert time.monotonic() - start > 1
    loopback_hub.faults.status("refs", 429, headers={"Retry-After": "1000000000"})
    assert within(0.5, lambda: client.refs("org/a")).wait == 1e9


def test_silence_and_dripping_end_at_the_deadline(client: Repositories, loopback_hub: LoopbackHub) -> None:
    client = Repositories(loopback_hub.endpoint, Secret(loopback_hub.token), timeout=1)
    loopback_hub.faults.slow("refs", 2, times=1)
    assert "no answer within 1 seconds" in str(within(1.5, lambda: client.refs("org/a")))
    loopback_hub.faults.drip("storage", 0.3, times=1)
    assert within(1.5, lambda: download(client)).transient


@pytest.mark.usefixtures("loopback_hub")
def test_dripping_headers_end_at_the_deadline() -> None:
    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(30):
                connection.sendall(b"x")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        client = Repositories(f"http://127.0.0.1:{listener.getsockname()[1]}", Secret(None), timeout=1)
        assert within(1.5, lambda: client.refs("org/a")).transient


def test_offline_is_said_at_once(client: Repositories, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: client.refs("org/a"), lambda: client.tag("org/a", "v1", head)):
        assert within(0.2, call).code == "Offline"


@pytest.mark.usefixtures("loopback_hub")
def test_nobody_there() -> None:
    client = Repositories("http://127.0.0.1:9", Secret("hf_x"), timeout=0.5)
    assert "refused" in str(within(1.5, lambda: client.refs("org/a")))


def test_call_within_hands_over_results_and_exceptions() -> None:
    assert call_within(Deadline(1), lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(Deadline(1), lambda: 1 // 0)
    deadline = Deadline(0.2)

    def slow_but_moving() -> str:
        for _ in range(4):
            time.sleep(0.1)
            deadline.allow(20_000)
        return "done"

    assert call_within(deadline, slow_but_moving) == "done"


# -- writing -------------------------------------------------------------------------------------------------------


def test_commit_adds_replaces_and_deletes(
    client: Repositories, loopback_hub: LoopbackHub, head: str, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(WEIGHTS[::-1])
    files: dict[str, Path | bytes] = {"b.safetensors": tmp_path / "w", "README.md": b"new"}
    made = client.commit("org/a", "main", files, parent=head, message="m", delete=("a.safetensors",))
    assert loopback_hub.files("org/a", made) == [".gitattributes", "README.md", "b.safetensors"]
    assert loopback_hub.read("org/a", "b.safetensors") == WEIGHTS[::-1]


@pytest.mark.parametrize("status", [None, 500, 503, 412, 400])
def test_lost_answer_to_a_commit_is_success(
    client: Repositories, loopback_hub: LoopbackHub, head: str, status: int | None
) -> None:
    loopback_hub.faults.lose_response("commit", status=status)
    files: dict[str, Path | bytes] = {"a.safetensors": WEIGHTS[1:], "README.md": b"new"}
    made = client.commit("org/a", "main", files, parent=head, message="m")
    repo = loopback_hub.repo("org/a")
    assert [commit.oid for commit in repo.history(repo.resolve("main"))][:2] == [made, head]


def test_somebody_elses_commit_is_no_success(client: Repositories, loopback_hub: LoopbackHub, head: str) -> None:
    loopback_hub.commit("org/a", {"README.md": b"not ours"})
    files: dict[str, Path | bytes] = {"README.md": b"ours!!!!"}
    assert failure(lambda: client.commit("org/a", "main", files, parent=head, message="m")).status == 412
    loopback_hub.faults.status("commit", 503, times=None)
    assert failure(lambda: client.commit("org/a", "main", files, parent=head, message="m")).status == 503


@pytest.mark.parametrize("status", [None, 503, 409])
def test_lost_answer_to_a_tag_is_success(
    client: Repositories, loopback_hub: LoopbackHub, head: str, status: int | None
) -> None:
    loopback_hub.faults.lose_response("tag", status=status)
    client.tag("org/a", "v1", head)
    assert loopback_hub.repo("org/a").tags == {"v1": head}


def test_tag_elsewhere_is_a_conflict(client: Repositories, loopback_hub: LoopbackHub, head: str) -> None:
    client.tag("org/a", "v1", head)
    client.tag("org/a", "v1", head)
    other = loopback_hub.commit("org/a", {"x": b"1"})
    assert failure(lambda: client.tag("org/a", "v1", other)).status == 409
    assert loopback_hub.repo("org/a").tags == {"v1": head}


def test_what_exists_is_left_as_it_is(client: Repositories, loopback_hub: LoopbackHub, head: str) -> None:
    client.create("org/a", private=True)
    assert not loopback_hub.repo("org/a").private
    client.create("org/b", private=True)
    assert loopback_hub.repo("org/b").private
    client.branch("org/a", "side", head)
    loopback_hub.commit("org/a", {"x": b"1"}, branch="side")
    client.branch("org/a", "side", head)
    assert loopback_hub.repo("org/a").branches["side"] != head


# -- xet -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def xet(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)


@pytest.mark.usefixtures("xet")
def test_xet_is_left_alone(
    client: Repositories, loopback_hub: LoopbackHub, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hub that names a folder as its xet storage can make the stock client write there."""
    victim = tmp_path / "victim"
    loopback_hub.faults.xet_cas_url = f"local://{victim}"
    (tmp_path / "w").write_bytes(WEIGHTS[1:])
    files: dict[str, Path | bytes] = {"a.safetensors": tmp_path / "w", "b.safetensors": b"abc"}
    made = client.commit("org/a", "main", files, parent=head, message="m")
    assert loopback_hub.read("org/a", "a.safetensors", made) == WEIGHTS[1:]
    assert download(client) == WEIGHTS[1:]
    assert not victim.exists()
    assert not any(route.startswith("xet") for route in loopback_hub.routes())
    assert caplog.text == ""


@pytest.mark.usefixtures("xet")
@needs("huggingface_hub", "2.4", "it raises another error")
def test_the_stock_client_falls_for_it(client: Repositories, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    """If this fails, the precaution above may no longer be needed."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import BadRequestError

    victim = tmp_path / "victim"
    loopback_hub.faults.xet_cas_url = f"local://{victim}"
    api = HfApi(endpoint=loopback_hub.endpoint, token=loopback_hub.token)
    with pytest.raises(BadRequestError):
        api.create_commit("org/a", [CommitOperationAdd("b.bin", b"\0" * 1000)], commit_message="m")
    assert victim.exists()


# -- redirects -----------------------------------------------------------------------------------------------------


def test_the_token_stays_at_the_hub(client: Repositories, loopback_hub: LoopbackHub) -> None:
    with LoopbackHub() as other:
        other.create_repo("org/a")
        other.commit("org/a", {"README.md": b"elsewhere"})
        loopback_hub.faults.redirect("resolve", f"{other.endpoint}/org/a/resolve/main/README.md")
        assert client.content("org/a", "main", "README.md", 100) == b"elsewhere"
        assert [served.authorized for served in other.requests] == [False, False]
    authorized = [served.authorized for served in loopback_hub.requests]
    assert authorized == [True] * len(authorized)


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "http://169.254.169.254/latest", "ftp://127.0.0.1/x", "local:///x", "http://", "",
     pytest.param("//[::1", marks=needs("huggingface_hub", "2.0", "its HTTP library fails at the address"))],
)  # fmt: skip
def test_redirects_that_are_not_followed(client: Repositories, loopback_hub: LoopbackHub, location: str) -> None:
    loopback_hub.faults.redirect("resolve", location)
    assert failure(lambda: client.content("org/a", "main", "README.md", 100)).code == "Hostile"


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names without a network: ``hub.example`` is public, ``inner.example`` is not, ``unknown.example`` is unknown."""
    known = {"hub.example": "8.8.8.8", "cdn.example": "8.8.4.4", "inner.example": "10.0.0.5"}

    def resolve(host: str, *args: object, **options: object) -> list[tuple[object, ...]]:
        if host not in known and not host[0].isdigit() and ":" not in host:
            raise OSError("unknown name")
        return [(0, 0, 0, "", (known.get(host, host), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.usefixtures("dns")
@pytest.mark.parametrize(
    ("endpoint", "location", "followed"),
    [
        ("https://hub.example", "/relative", True),
        ("https://hub.example", "https://cdn.example/x?signature=1", True),
        ("https://hub.example", "https://unknown.example/x", True),
        ("https://hub.example", "http://cdn.example/x", False),
        ("https://hub.example", "http://hub.example/x", False),
        ("https://hub.example", "https://127.0.0.1/x", False),
        ("https://hub.example", "https://[::1]/x", False),
        ("https://hub.example", "https://inner.example/x", False),
        ("https://hub.example", "https://192.168.1.1/x", False),
        ("https://hub.example", "https://[::ffff:10.0.0.1]/x", False),
        ("https://hub.example", "https://169.254.169.254/x", False),
        ("http://inner.example", "http://10.0.0.7/x", True),
        ("http://inner.example", "http://169.254.169.254/x", False),
        ("http://inner.example", "https://cdn.example:99999/x", False),
    ],
)
def test_where_redirects_may_lead(endpoint: str, location: str, followed: bool) -> None:
    if followed:
        assert next_url(endpoint, f"{endpoint}/a", location)
    else:
        with pytest.raises(RefusedRedirect) as caught:
            next_url(endpoint, f"{endpoint}/a", location)
        assert "signature" not in str(caught.value)


def test_same_origin() -> None:
    assert same_origin("https://a.example/x", "https://A.example:443/y")
    for other in ("http://a.example", "https://b.example", "https://a.example:444", "https://a.example.evil"):
        assert not same_origin("https://a.example", other)


# -- secrets -------------------------------------------------------------------------------------------------------


def everything_about(error: BaseException) -> str:
    """All that a logger, a debugger or another process could get out of an exception, short of the client's frames."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    texts = [str(error), repr(error), repr(vars(error)), "".join(shown.format()), repr(pickle.dumps(error))]
    if error.__context__ is not None:
        texts.append(everything_about(error.__context__))
    return "\n".join(texts)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.refs("org/nothing"),
        lambda client: client.create("others/x", private=None),
        lambda client: client.commit("org/a", "main", {"x": b"1"}, parent="0" * 40, message="m"),
        lambda client: client.tag("org/a", "v1", "0" * 40),
        lambda client: client.content("org/a", "main", "no", 10),
    ],
)
@pytest.mark.parametrize("fault", [None, "503", "close", "echo"])
def test_the_token_is_in_no_error(
    loopback_hub: LoopbackHub, call: Callable[[Repositories], object], fault: str | None
) -> None:
    loopback_hub.create_repo("org/a")
    client = Repositories(loopback_hub.endpoint, Secret(loopback_hub.token), timeout=0.3)
    if fault == "503":
        loopback_hub.faults.status("*", 503, times=None)
    elif fault == "close":
        loopback_hub.faults.refuse_connection("*", times=None)
    elif fault == "echo":
        loopback_hub.faults.status("*", 400, times=None, headers={"X-Error-Message": f"no {loopback_hub.token} here"})
    error = failure(lambda: call(client))
    assert loopback_hub.token not in everything_about(error)
    if fault == "echo":
        assert "no *** here" in str(error)


def test_secrets_are_not_shown_or_pickled() -> None:
    secret = Secret("hf_abc")
    client = Repositories("http://127.0.0.1:9", secret, 1)
    assert "hf_abc" not in repr(secret) + str(secret) + repr(client) + repr(vars(client))
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(client)


def test_clean_text() -> None:
    clean = cleaner(lambda: ["hf_abc"])
    assert clean("a \x1b[31mred\x1b[0m\r\nhf_abc \u202etxt") == "a [31mred [0m *** txt"
    assert len(clean("x" * 10_000)) == 301
