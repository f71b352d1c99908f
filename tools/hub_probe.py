"""Calls of a stock huggingface_hub client against a loopback Hub, one result a line (run by check_hub_clients.py).

Needs nothing but huggingface_hub (0.36 or newer), so that it can run in any client's own environment. Arguments: the
endpoint, a token, a second user's token, and whether the endpoint is a read-only proxy in front of the Hub.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import (  # noqa: TID253 (a script of the client's own environment)
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (  # noqa: TID253
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 1000
CARD = b"---\nlibrary_name: peft\nbase_model: org/base\n---\n# An adapter\n"


def run(name: str, call: Callable[[], object]) -> object:
    """Make one call and print how it went; an assertion or any other exception is a failure."""
    try:
        value = call()
    except Exception as error:
        print(json.dumps({"call": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}))
        return None
    print(json.dumps({"call": name, "ok": True}))
    return value


def refused(kind: type[Exception], call: Callable[[], object], status: int | None = None) -> None:
    """Assert that ``call`` raises ``kind`` (with this HTTP status)."""
    try:
        call()
    except kind as error:
        got = getattr(getattr(error, "response", None), "status_code", None)
        assert status in (None, got), f"status {got} instead of {status}"
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def probe_writing(api: HfApi, repo: str) -> str:
    """Create, commit, tag, branch; returns the id of the commit tagged v1."""
    run("whoami", lambda: _equal(api.whoami()["name"], "user"))
    run("create_repo", lambda: api.create_repo(repo))
    run("create_repo again", lambda: refused(HfHubHTTPError, lambda: api.create_repo(repo), 409))
    run("create_repo exist_ok", lambda: api.create_repo(repo, exist_ok=True))
    run("create_repo elsewhere", lambda: refused(HfHubHTTPError, lambda: api.create_repo("others/x"), 403))
    first = api.repo_info(repo).sha
    operations = [
        CommitOperationAdd("README.md", CARD),
        CommitOperationAdd("adapter_config.json", b'{"r": 8}'),
        CommitOperationAdd("adapter_model.safetensors", io.BytesIO(WEIGHTS)),
    ]
    made = run(
        "create_commit",
        lambda: api.create_commit(repo, operations, commit_message="one", parent_commit=first).oid,
    )
    again = [CommitOperationAdd("adapter_config.json", b'{"r": 8}')]
    run("unchanged file makes no commit", lambda: _equal(api.create_commit(repo, again, commit_message="-").oid, made))
    stale = [CommitOperationAdd("x.txt", b"x")]
    run(
        "stale parent_commit",
        lambda: refused(
            HfHubHTTPError, lambda: api.create_commit(repo, stale, commit_message="-", parent_commit=first), 412
        ),
    )
    run("create_tag", lambda: api.create_tag(repo, tag="v1", revision=str(made)))
    run("create_tag again", lambda: refused(HfHubHTTPError, lambda: api.create_tag(repo, tag="v1"), 409))
    run("create_tag exist_ok", lambda: api.create_tag(repo, tag="v1", exist_ok=True))
    run(
        "create_tag at nothing",
        lambda: refused(RevisionNotFoundError, lambda: api.create_tag(repo, tag="v2", revision="nope")),
    )
    run("create_branch", lambda: api.create_branch(repo, branch="side/line", revision="v1"))
    branch = {"repo_id": repo, "branch": "side/line"}
    run("create_branch again", lambda: refused(HfHubHTTPError, lambda: api.create_branch(**branch), 409))
    run(
        "upload_file to a branch",
        lambda: api.upload_file(
            path_or_fileobj=b"side", path_in_repo="side.txt", repo_id=repo, revision="side/line", commit_message="side"
        ),
    )
    run(
        "upload_file in a pull request",
        lambda: _ends(
            api.upload_file(path_or_fileobj=b"pr", path_in_repo="pr.txt", repo_id=repo, create_pr=True).pr_url, "/1"
        ),
    )
    run("delete_branch", lambda: api.delete_branch(repo, branch="side/line"))
    deletion = [CommitOperationDelete("adapter_config.json")]
    run("commit with a deletion", lambda: api.create_commit(repo, deletion, commit_message="two"))
    return str(made)


def probe_reading(api: HfApi, repo: str, commit: str, token: str) -> None:
    """Look at and download what is there."""
    run("repo_info", lambda: _equal(api.repo_info(repo, revision="v1").sha, commit))
    run("repo_info by a short commit id", lambda: _equal(api.repo_info(repo, revision=commit[:7]).sha, commit))
    run("model_info with files", lambda: _lfs_sizes(api, repo))
    run("repo_exists", lambda: _equal((api.repo_exists(repo), api.repo_exists("org/nothing")), (True, False)))
    run("revision_exists", lambda: _equal(api.revision_exists(repo, "nope"), False))
    run("file_exists", lambda: _equal(api.file_exists(repo, "README.md", revision="v1"), True))
    run("list_repo_refs", lambda: _equal([tag.target_commit for tag in api.list_repo_refs(repo).tags], [commit]))
    run("list_repo_commits", lambda: _equal(len(api.list_repo_commits(repo, revision="v1")), 2))
    run("list_repo_files", lambda: _equal(len(api.list_repo_files(repo, revision="v1")), 4))
    run("list_repo_tree", lambda: _equal(len(list(api.list_repo_tree(repo, revision="v1", recursive=True))), 4))
    run("get_paths_info", lambda: _equal(api.get_paths_info(repo, ["README.md", "no"])[0].path, "README.md"))
    run("unknown repository", lambda: refused(RepositoryNotFoundError, lambda: api.repo_info("org/nothing")))
    run("unknown revision", lambda: refused(RevisionNotFoundError, lambda: api.repo_info(repo, revision="nope")))
    probe_downloads(api.endpoint, repo, token)


def probe_downloads(endpoint: str, repo: str, token: str) -> None:
    """The two functions by which files are downloaded."""
    options = {"endpoint": endpoint, "token": token}
    with tempfile.TemporaryDirectory() as cache:
        run("hf_hub_download", lambda: _holds(hf_hub_download(repo, "README.md", cache_dir=cache, **options), CARD))
        run(
            "hf_hub_download of an LFS file",
            lambda: _holds(hf_hub_download(repo, "adapter_model.safetensors", cache_dir=cache, **options), WEIGHTS),
        )
        run(
            "unknown file",
            lambda: refused(EntryNotFoundError, lambda: hf_hub_download(repo, "no", cache_dir=cache, **options)),
        )
    with tempfile.TemporaryDirectory() as cache:
        run(
            "snapshot_download",
            lambda: _holds(
                f"{snapshot_download(repo, revision='v1', cache_dir=cache, **options)}/adapter_model.safetensors",
                WEIGHTS,
            ),
        )


def probe_access(api: HfApi, stranger: HfApi, token: str) -> None:
    """Private and gated repositories, and tokens that are not good enough."""
    api.create_repo("org/private", private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="org/private")
    run("private, owner", lambda: _equal(api.repo_info("org/private").private, True))
    run("private, stranger", lambda: refused(RepositoryNotFoundError, lambda: stranger.repo_info("org/private")))
    api.create_repo("org/gated")
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="org/gated")
    run("gate", lambda: api.update_repo_settings("org/gated", gated="auto"))
    with tempfile.TemporaryDirectory() as cache:
        download = {"endpoint": api.endpoint, "cache_dir": cache}
        run("gated, owner", lambda: _holds(hf_hub_download("org/gated", "a.txt", token=token, **download), b"secret"))
    with tempfile.TemporaryDirectory() as cache:
        download = {"endpoint": api.endpoint, "cache_dir": cache}
        run(
            "gated, stranger",
            lambda: refused(
                GatedRepoError, lambda: hf_hub_download("org/gated", "a.txt", token=stranger.token, **download)
            ),
        )
    bad = HfApi(endpoint=api.endpoint, token="hf_wrong")
    # Not HfHubHTTPError: 0.36 raises its HTTP library's own error here.
    run("bad token", lambda: refused(Exception, bad.whoami, 401))
    run("stranger cannot write", lambda: refused(HfHubHTTPError, lambda: _upload(stranger, "org/gated"), 403))
    run("delete_tag", lambda: (api.create_tag("org/gated", tag="t"), api.delete_tag("org/gated", tag="t")))
    run("delete_repo", lambda: api.delete_repo("org/private"))


def _upload(api: HfApi, repo: str) -> None:
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo)


def _equal(value: object, expected: object) -> None:
    assert value == expected, f"{value!r} instead of {expected!r}"


def _ends(value: object, ending: str) -> None:
    assert str(value).endswith(ending), value


def _holds(path: str, content: bytes) -> None:
    assert Path(path).read_bytes() == content, f"other bytes in {path}"


def _lfs_sizes(api: HfApi, repo: str) -> None:
    files = {file.rfilename: file for file in api.model_info(repo, revision="v1", files_metadata=True).siblings}
    _equal(files["adapter_model.safetensors"].lfs.size, len(WEIGHTS))
    _equal((files["README.md"].size, files["README.md"].lfs), (len(CARD), None))


def main() -> None:
    """Run the calls that the endpoint is meant for."""
    endpoint, token, strangers_token, mode = sys.argv[1:]
    api = HfApi(endpoint=endpoint, token=token)
    if mode == "proxy":
        probe_downloads(endpoint, "org/ready", token)
        return
    commit = probe_writing(api, "org/probe")
    probe_reading(api, "org/probe", commit, token)
    probe_access(api, HfApi(endpoint=endpoint, token=strangers_token), token)


if __name__ == "__main__":
    main()
