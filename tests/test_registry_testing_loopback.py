"""The loopback Hub: what clients see of it, its faults, the fixture and the program."""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from registry.testing import Faults, LoopbackHub, LoopbackHubCrash
from registry.testing.routes import ROUTES
from registry.testing.store import HubFailure

ROOT = Path(__file__).parent.parent


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Message

    def json(self) -> Any:
        return json.loads(self.body)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


def ask(
    hub: LoopbackHub,
    path: str,
    method: str = "GET",
    *,
    token: str | None = "",
    data: object = None,
    follow: bool = True,
    **headers: str,
) -> Answer:
    """One request by the standard library's client; ``token=""`` is the hub's own, ``None`` none."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        sent["Authorization"] = f"Bearer {token or hub.token}"
    body = data if isinstance(data, bytes) or data is None else json.dumps(data).encode()
    url = path if path.startswith("http") else hub.endpoint + path
    opener = urllib.request.build_opener() if follow else urllib.request.build_opener(_Stay)
    try:
        with opener.open(urllib.request.Request(url, body, sent, method=method), timeout=20) as response:
            return Answer(response.status, response.read(), response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(), error.headers)


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> LoopbackHub:
    loopback_hub.create_repo("org/a")
    loopback_hub.commit("org/a", {"README.md": b"card", "adapter_model.safetensors": bytes(range(200))})
    return loopback_hub


def test_installed_client_passes_the_probe(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    stranger = loopback_hub.add_user("stranger").token
    arguments = [loopback_hub.endpoint, loopback_hub.token, stranger, "hub"]
    settings = {"HF_ENDPOINT": loopback_hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "hub_probe.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        timeout=120,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, [row for row in rows if not row["ok"]]) == (0, []), done.stderr
    assert len(rows) == 44
    assert loopback_hub.leaks() == []


@pytest.mark.slow
def test_other_clients_pass_the_probe() -> None:
    """Needs a package index: installs each client into an environment of its own, kept between runs."""
    # Loopback is no network: clients that are told to be offline would not even ask there.
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    program = [sys.executable, str(ROOT / "tools" / "check_hub_clients.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800, env=online)
    if done.returncode == 77:
        pytest.skip(f"no client can be installed here:\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


# -- content -------------------------------------------------------------------------------------------------------


def test_small_files_are_redirected_on_the_hub_and_large_ones_to_the_other_origin(hub: LoopbackHub) -> None:
    small = ask(hub, "/org/a/resolve/main/README.md", follow=False)
    large = ask(hub, "/org/a/resolve/main/adapter_model.safetensors", follow=False)
    assert (small.status, large.status) == (307, 302)
    assert small.headers["Location"].startswith("/api/resolve-cache/models/org/a/")
    assert large.headers["Location"].startswith(f"{hub.storage_origin}/storage/")
    assert hub.storage_origin.startswith("http://localhost:")
    assert large.headers["X-Linked-Size"] == "200"
    assert large.headers["X-Repo-Commit"] == hub.repo("org/a").branches["main"]


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=0-9", 206, bytes(range(10))),
        ("bytes=190-", 206, bytes(range(190, 200))),
        ("bytes=-5", 206, bytes(range(195, 200))),
        ("bytes=190-999", 206, bytes(range(190, 200))),
        ("bytes=200-", 416, b""),
        ("lines=1-2", 200, bytes(range(200))),
    ],
)
def test_ranges(hub: LoopbackHub, asked: str, status: int, got: bytes) -> None:
    answer = ask(hub, "/org/a/resolve/main/adapter_model.safetensors", token=None, Range=asked)
    assert (answer.status, answer.body) == (status, got)


def test_commit_ids_depend_on_content_and_history_is_linear(hub: LoopbackHub) -> None:
    repo = hub.repo("org/a")
    first = repo.branches["main"]
    second = hub.commit("org/a", {"README.md": b"other"})
    history = [commit.oid for commit in repo.history(repo.resolve("main"))]
    assert history[:2] == [second, first]
    assert len(set(history)) == 3
    assert repo.resolve(first[:7]).oid == first
    assert hub.read("org/a", "README.md", first) == b"card"


def test_multipart_upload(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    loopback_hub.set_part_size(1000)
    api = HfApi(endpoint=loopback_hub.endpoint, token=loopback_hub.token)
    api.create_repo("org/a")
    content = os.urandom(3500)
    api.create_commit("org/a", [CommitOperationAdd("a.bin", io.BytesIO(content))], commit_message="m")
    assert loopback_hub.routes().count("lfs_part") == 4
    assert loopback_hub.read("org/a", "a.bin") == content


def test_listings_have_pages(hub: LoopbackHub) -> None:
    from huggingface_hub import HfApi

    hub.commit("org/a", {f"f{number}": b"x" for number in range(7)})
    hub.set_page_size(3)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    assert len(list(api.list_repo_tree("org/a"))) == 10
    assert len(api.list_repo_commits("org/a")) == 3
    assert hub.routes().count("tree") == 4


def test_stale_parent_is_refused_with_nothing_written(hub: LoopbackHub) -> None:
    parent = hub.repo("org/a").branches["main"]
    moved = hub.commit("org/a", {"README.md": b"moved"})
    body = b'{"key": "header", "value": {"summary": "s", "parentCommit": "%s"}}\n' % parent.encode()
    body += b'{"key": "file", "value": {"path": "x", "content": "eA==", "encoding": "base64"}}\n'
    assert ask(hub, "/api/models/org/a/commit/main", "POST", data=body).status == 412
    assert hub.repo("org/a").branches["main"] == moved
    hub.faults.ignores_parent_commit = True
    assert ask(hub, "/api/models/org/a/commit/main", "POST", data=body).status == 200
    assert hub.read("org/a", "x") == b"x"


def test_a_commit_is_all_or_nothing(hub: LoopbackHub) -> None:
    before = hub.repo("org/a").branches["main"]
    missing = "0" * 64
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"path": "x", "content": "eA==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "y.bin", "algo": "sha256", "oid": missing, "size": 3}},
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    answer = ask(hub, "/api/models/org/a/commit/main", "POST", data=body)
    assert (answer.status, missing in answer.body.decode()) == (400, True)
    assert hub.repo("org/a").branches["main"] == before


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a\\b", ".git/config", ""])
def test_hostile_paths_are_not_committed(hub: LoopbackHub, path: str) -> None:
    body = json.dumps({"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}}).encode()
    assert ask(hub, "/api/models/org/a/commit/main", "POST", data=body).status == 400


def test_uploaded_bytes_must_have_their_hash(hub: LoopbackHub) -> None:
    assert ask(hub, f"{hub.storage_origin}/storage/{'0' * 64}", "PUT", token=None, data=b"x").status == 400


def test_chunked_requests(hub: LoopbackHub) -> None:
    connection = http.client.HTTPConnection(hub.endpoint.partition("//")[2], timeout=10)
    headers = {"Authorization": f"Bearer {hub.token}", "Transfer-Encoding": "chunked"}
    connection.request(
        "POST", "/api/models/org/a/tag/main", iter([b'{"tag":', b' "v1"}']), headers, encode_chunked=True
    )
    assert connection.getresponse().status == 200
    connection.close()
    assert hub.repo("org/a").tags == {"v1": hub.repo("org/a").branches["main"]}


@pytest.mark.parametrize("name", ["a..b", "/a", "a b", "a~1", "", "a" * 3 + "\n", "0" * 40])
def test_invalid_tags_are_refused(hub: LoopbackHub, name: str) -> None:
    assert ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": name}).status == 400


def test_access(hub: LoopbackHub) -> None:
    stranger, reader = hub.add_user("stranger"), hub.add_user("reader", orgs=["org"], role="read")
    hub.create_repo("org/private", private=True)
    hub.create_repo("org/gated", gated=True)

    def see(path: str, token: str | None) -> tuple[int, str | None]:
        answer = ask(hub, path, token=token)
        return answer.status, answer.headers["X-Error-Code"]

    assert see("/api/models/org/private", None) == (401, "RepoNotFound")
    assert see("/api/models/org/private", stranger.token) == (404, "RepoNotFound")
    assert see("/api/models/org/private", reader.token) == (200, None)
    assert see("/api/models/org/gated", stranger.token) == (200, None)
    assert see("/org/gated/resolve/main/.gitattributes", stranger.token) == (403, "GatedRepo")
    assert see("/org/gated/resolve/main/.gitattributes", None) == (401, "GatedRepo")
    hub.repo("org/gated").readers.add("stranger")
    assert see("/org/gated/resolve/main/.gitattributes", stranger.token) == (200, None)
    assert ask(hub, "/api/models/org/a/tag/main", "POST", token=reader.token, data={"tag": "v1"}).status == 403
    assert ask(hub, "/api/models/org/a/tag/main", "POST", token=None, data={"tag": "v1"}).status == 401


def test_models_are_found_by_the_tags_of_their_cards(hub: LoopbackHub) -> None:
    card = b"---\nbase_model: org/base\ntags:\n- lora\n- 'x'\n---\n"
    hub.commit("org/a", {"README.md": card})
    hub.create_repo("org/other")
    hub.create_repo("org/hidden", private=True)

    def found(query: str, token: str | None = "") -> list[str]:
        models = ask(hub, f"/api/models?{query}", token=token).json()
        return [model["id"] for model in models]

    assert found("filter=base_model:adapter:org/base&filter=lora") == ["org/a"]
    assert found("author=org") == ["org/a", "org/hidden", "org/other"]
    assert found("author=org", token=None) == ["org/a", "org/other"]
    assert found("search=oth") == ["org/other"]


def test_super_squash_rewrites_the_branch_and_keeps_the_tags(hub: LoopbackHub) -> None:
    repo = hub.repo("org/a")
    hub.move_tag("org/a", "v1", "main")
    assert ask(hub, "/api/models/org/a/super-squash/main", "POST", data={}).status == 200
    assert len(repo.history(repo.resolve("main"))) == 1
    assert len(repo.history(repo.resolve("v1"))) == 2
    assert repo.resolve("main").files == repo.resolve("v1").files


# -- faults --------------------------------------------------------------------------------------------------------


def test_lost_response_happens_after_the_deed(hub: LoopbackHub) -> None:
    hub.faults.lose_response("tag")
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v1"})
    assert "v1" in hub.repo("org/a").tags
    hub.faults.lose_response("tag", status=503)
    assert ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v2"}).status == 503
    assert "v2" in hub.repo("org/a").tags
    assert ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v3"}).status == 200


def test_status_and_refused_connection_happen_instead_of_the_deed(hub: LoopbackHub) -> None:
    hub.faults.status("tag", 429, times=2, headers={"Retry-After": "7"})
    for _ in range(2):
        answer = ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v1"})
        assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
    hub.faults.refuse_connection("tag")
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v1"})
    assert hub.repo("org/a").tags == {}
    assert ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v1"}).status == 200


def test_star_is_every_route_and_clear_ends_all(hub: LoopbackHub) -> None:
    hub.faults.status("*", 503, times=None)
    assert {ask(hub, path).status for path in ("/api/whoami-v2", "/api/models/org/a", "/nothing")} == {503}
    hub.faults.clear()
    assert ask(hub, "/api/whoami-v2").status == 200


def test_tampered_bytes_keep_their_size_and_etag(hub: LoopbackHub) -> None:
    path = "/org/a/resolve/main/adapter_model.safetensors"
    clean = ask(hub, path)
    hub.faults.tamper("*.safetensors", times=1)
    tampered = ask(hub, path)
    assert tampered.headers["ETag"] == clean.headers["ETag"]
    assert len(tampered.body) == len(clean.body)
    assert tampered.body != clean.body
    assert ask(hub, "/org/a/resolve/main/README.md").body == b"card"
    assert ask(hub, path).body == clean.body


def test_truncated_bytes(hub: LoopbackHub) -> None:
    path = "/org/a/resolve/main/adapter_model.safetensors"
    hub.faults.truncate("*.safetensors", times=1)
    with pytest.raises(http.client.IncompleteRead):
        ask(hub, path)
    hub.faults.truncate("*.safetensors", times=1, declared=True)
    assert ask(hub, path).body == bytes(range(100))


def test_replaced_bytes_and_answers(hub: LoopbackHub) -> None:
    hub.faults.replace("README.md", b"another", times=1)
    assert ask(hub, "/org/a/resolve/main/README.md").body == b"another"
    hub.faults.answer("refs", b"<html>", Content_Type="text/html")
    answer = ask(hub, "/api/models/org/a/refs")
    assert (answer.body, answer.headers["Content-Type"]) == (b"<html>", "text/html")


def test_redirect_elsewhere(hub: LoopbackHub) -> None:
    hub.faults.redirect("resolve", "http://169.254.169.254/", path="*.safetensors")
    answer = ask(hub, "/org/a/resolve/main/adapter_model.safetensors", follow=False)
    assert (answer.status, answer.headers["Location"]) == (302, "http://169.254.169.254/")
    assert ask(hub, "/org/a/resolve/main/README.md").body == b"card"


def test_slow_and_dripping_answers(hub: LoopbackHub) -> None:
    hub.faults.slow("refs", 0.2, times=1)
    hub.faults.drip("resolve_cache", 0.08, times=1)
    for path in ("/api/models/org/a/refs", "/org/a/resolve/main/README.md"):
        start = time.monotonic()
        assert ask(hub, path).status == 200
        assert time.monotonic() - start >= 0.19


def test_hostile_listing_can_be_listed_and_downloaded(hub: LoopbackHub) -> None:
    hub.faults.hostile_listing(["../../x", ".git/config"])
    tree = ask(hub, "/api/models/org/a/tree/main?recursive=true").json()
    assert [entry["path"] for entry in tree][-2:] == ["../../x", ".git/config"]
    siblings = ask(hub, "/api/models/org/a").json()["siblings"]
    assert siblings[-1] == {"rfilename": ".git/config"}
    assert ask(hub, "/org/a/resolve/main/.git%2Fconfig").body == b"hostile\n"


def test_a_hub_that_does_not_resolve_tags(hub: LoopbackHub) -> None:
    hub.move_tag("org/a", "v1", "main")
    assert ask(hub, "/api/models/org/a/revision/v1").status == 200
    hub.faults.resolves_tags = False
    assert ask(hub, "/api/models/org/a/revision/v1").headers["X-Error-Code"] == "RevisionNotFound"
    assert "v1" in ask(hub, "/api/models/org/a/refs").body.decode()


def test_xet_is_off_unless_asked_for(hub: LoopbackHub) -> None:
    assert ask(hub, "/api/models/org/a/xet-write-token/main").status == 404
    hub.faults.xet_cas_url = "local:///somewhere"
    answer = ask(hub, "/api/models/org/a/xet-write-token/main")
    assert answer.headers["X-Xet-Cas-Url"] == "local:///somewhere"
    file = ask(hub, "/org/a/resolve/main/adapter_model.safetensors", follow=False)
    assert "xet-read-token" in file.headers["Link"]


def test_callbacks_see_the_request_before_and_after_it_is_acted_on(hub: LoopbackHub) -> None:
    seen: list[tuple[str, bool]] = []
    tags = hub.repo("org/a").tags
    hub.faults.call_before("tag", lambda request: seen.append((request.route, "v1" in tags)))
    hub.faults.call_after("tag", lambda request: seen.append((request.route, "v1" in tags)))
    ask(hub, "/api/models/org/a/tag/main", "POST", data={"tag": "v1"})
    assert seen == [("tag", False), ("tag", True)]


# -- the fixture, the program, the log -----------------------------------------------------------------------------


def test_requests_are_logged_without_tokens(hub: LoopbackHub) -> None:
    ask(hub, "/api/whoami-v2")
    ask(hub, "/org/a/resolve/main/README.md", token=None)
    assert hub.routes() == ["whoami", "resolve", "resolve_cache"]
    assert [served.authorized for served in hub.requests] == [True, False, False]
    assert hub.token not in repr(hub.requests) + repr(hub)


def test_a_token_at_the_storage_origin_is_reported(hub: LoopbackHub) -> None:
    location = ask(hub, "/org/a/resolve/main/adapter_model.safetensors", follow=False).headers["Location"]
    ask(hub, location, token=None)
    assert hub.leaks() == []
    ask(hub, location)
    assert [served.route for served in hub.leaks()] == ["storage"]


def test_a_bug_of_the_server_fails_the_test_that_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> NoReturn:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(ROUTES, "whoami", replace(ROUTES["whoami"], function=broken))
    hub = LoopbackHub().start()
    assert ask(hub, "/api/whoami-v2").status == 400
    with pytest.raises(LoopbackHubCrash, match="ZeroDivisionError: a bug"):
        hub.__exit__(None, None, None)


def test_two_hubs_know_nothing_of_each_other(hub: LoopbackHub) -> None:
    with LoopbackHub(user="bob", orgs=["club"]) as other:
        assert other.endpoint != hub.endpoint
        assert ask(other, "/api/models/org/a").status == 404
        assert ask(other, "/api/whoami-v2", token=hub.token).status == 401
        with pytest.raises(HubFailure, match="Invalid repository name"):
            other.create_repo("club/../x")


def test_program_prints_endpoint_and_token_and_serves() -> None:
    command = [sys.executable, "-m", "registry.testing.loopback", "--user", "bob", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        settings = dict(process.stdout.readline().decode().strip().split("=", 1) for _ in range(2))
        request = urllib.request.Request(
            f"{settings['HF_ENDPOINT']}/api/whoami-v2", headers={"Authorization": f"Bearer {settings['HF_TOKEN']}"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response)["name"] == "bob"
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")


def test_plugin_module_imports_next_to_nothing() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import registry.testing.pytest_plugin; "
        "new = sorted(set(sys.modules) - before); assert not [n for n in new if not n.startswith('registry')], new"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_code_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "registry-testing.md").read_text(encoding="utf-8")
    module, script = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    (tmp_path / "test_publishing.py").write_text(module, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_documentation_names_every_fault() -> None:
    page = (ROOT / "docs" / "registry-testing.md").read_text(encoding="utf-8")
    settings = {"ignores_parent_commit", "resolves_tags", "xet_cas_url"}
    methods = {name for name in vars(Faults) if not name.startswith("_")} - {
        "before",
        "after",
        "listing",
        "name_storage",
    }
    assert {name for name in methods | settings if name not in page} == set()


def test_a_commit_is_found_while_others_are_made(loopback_hub: LoopbackHub) -> None:
    class Growing(dict[str, Any]):
        """Commits that other requests add to all the time."""

        def __iter__(self) -> NoReturn:
            raise RuntimeError("dictionary changed size during iteration")

    repo = loopback_hub.create_repo("org/a")
    head = repo.branches["main"]
    repo.commits = Growing(repo.commits)
    assert repo.resolve(head).oid == head
    repo.commits = dict.copy(repo.commits)
    assert repo.resolve(head[:7]).oid == head
