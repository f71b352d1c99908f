"""Upload routes: pre-upload, git-lfs and commit."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

from registry.testing.routes.site import Site
from registry.testing.store import Entry, HubFailure
from registry.testing.wire import Request, Response

__all__ = [
    "commit",
    "lfs_batch",
    "lfs_complete",
    "lfs_part",
    "lfs_upload",
    "lfs_verify",
    "preupload",
    "validate_yaml",
    "xet_token",
]

_STALE = "A commit has happened since. Please refresh and try again."


def validate_yaml(site: Site, request: Request) -> Response:
    """Accept any model card whose front matter, if it has one, is closed. (The real Hub checks its fields.)"""
    content = str(request.json().get("content"))
    if content.startswith("---\n") and "\n---" not in content[4:]:
        return Response.of({"errors": [{"message": "The front matter is not closed"}], "warnings": []}, 400)
    return Response.of({"errors": [], "warnings": []})


def preupload(site: Site, request: Request) -> Response:
    repo = site.repo(request, write=True)
    revision = request.parts["rev"]
    current = site.commit(repo, revision)
    answer = []
    for file in _check_records(request.json().get("files")):
        path, sample = str(file["path"]), base64.b64decode(str(file.get("sample") or ""))
        lfs = site.store.wants_lfs(repo, revision, path, int(str(file["size"])), sample)
        item: dict[str, object] = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in current.files:
            item["oid"] = current.files[path].unchanged_oid
        answer.append(item)
    return Response.of({"files": answer, "commitOid": current.oid})


def xet_token(site: Site, request: Request) -> Response:
    """Return the address of the xet storage; 404 unless a fault sets one."""
    site.repo(request, write=request.route == "xet_write_token")
    url = site.faults.xet_cas_url
    if url is None:
        raise HubFailure(404, "This hub has no xet storage")
    token = {"casUrl": url, "accessToken": "loopback", "exp": 4102444800}
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "loopback", "X-Xet-Token-Expiration": "4102444800"}
    return Response.of(token, 200, **headers)


def lfs_batch(site: Site, request: Request) -> Response:
    site.repo(request, write=True)
    return Response.of({"transfer": "basic", "objects": [_list_actions(site, item) for item in _read_objects(request)]})


def lfs_upload(site: Site, request: Request) -> Response:
    site.store.add_blob(request.parts["sha256"], request.body)
    return Response()


def lfs_part(site: Site, request: Request) -> Response:
    etag = site.store.add_part(request.parts["sha256"], int(request.parts["number"]), request.body)
    return Response(headers={"ETag": f'"{etag}"'})


def lfs_complete(site: Site, request: Request) -> Response:
    numbers = [int(str(part["partNumber"])) for part in _check_records(request.json().get("parts"))]
    site.store.join_parts(request.parts["sha256"], numbers)
    return Response.of({})


def lfs_verify(site: Site, request: Request) -> Response:
    wanted = request.json()
    content = site.store.blobs.get(str(wanted.get("oid")))
    if content is None or len(content) != wanted.get("size"):
        raise HubFailure(404, f"Object not found: {wanted.get('oid')}")
    return Response.of({})


def commit(site: Site, request: Request) -> Response:
    """Apply an ndjson list of operations to a branch, all or nothing."""
    repo = site.repo(request, write=True)
    header, operations = _read_commit(request.body)
    new_request = request.query.get("create_pr") in ("1", "true")
    with site.store.lock:
        name = site.branch(repo, request.parts["rev"])
        head = repo.resolve(name)
        expected = header.get("parentCommit")
        if expected and expected != head.oid and not site.faults.ignores_parent_commit:
            raise HubFailure(412, _STALE)
        files = dict(head.files)
        for key, value in operations:
            _apply(site, files, key, value)
        if new_request:
            name = f"refs/pr/{len(repo.pull_requests) + 1}"
            repo.pull_requests[name] = head.oid
        made = site.store.write_commit(
            repo,
            name,
            files,
            title=str(header.get("summary") or ""),
            message=str(header.get("description") or ""),
            author=request.user.name if request.user else "",
        )
    url = f"{site.hub_origin}/{repo.id}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    if new_request:
        answer["pullRequestUrl"] = f"{url}/discussions/{name.rpartition('/')[2]}"
    return Response.of(answer)


def _read_commit(body: bytes) -> tuple[dict[str, object], list[tuple[str, dict[str, object]]]]:
    header: dict[str, object] = {}
    operations = []
    for line in body.splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key, value = record["key"], dict(record["value"])
        except (ValueError, TypeError, KeyError):
            raise HubFailure(400, "A line of the commit is not {key, value}") from None
        if key == "header":
            header = value
        else:
            operations.append((key, value))
    return header, operations


def _apply(site: Site, files: dict[str, Entry], key: str, value: dict[str, object]) -> None:
    path = str(value.get("path"))
    if key in ("file", "lfsFile"):
        _check_path(path)
    if key == "file":
        text = str(value.get("content"))
        content = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
        files[path] = site.store.entry(content, lfs=False)
    elif key == "lfsFile":
        files[path] = site.store.lfs_entry(str(value.get("oid")))
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubFailure(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[name]
    else:
        raise HubFailure(400, f"Unknown operation: {key}")


def _check_path(path: str) -> None:
    names = path.split("/")
    if any(name in ("", ".", "..", ".git") for name in names) or "\\" in path or "\0" in path:
        raise HubFailure(400, f"Invalid path: {path!r}")


def _read_objects(request: Request) -> Iterator[tuple[str, int]]:
    for item in _check_records(request.json().get("objects")):
        yield str(item["oid"]), int(str(item["size"]))


def _list_actions(site: Site, wanted: tuple[str, int]) -> dict[str, object]:
    """Return where to upload an object; no actions if it is stored already."""
    oid, size = wanted
    answer: dict[str, object] = {"oid": oid, "size": size}
    if oid in site.store.blobs:
        return answer
    upload: dict[str, object] = {"href": f"{site.storage_origin}/storage/{oid}"}
    if size > site.part_size:
        numbers = range(1, -(-size // site.part_size) + 1)
        parts = {str(number): f"{site.storage_origin}/storage/{oid}/{number}" for number in numbers}
        upload = {
            "href": f"{site.hub_origin}/lfs/{oid}/complete",
            "header": {"chunk_size": str(site.part_size), **parts},
        }
    answer["actions"] = {"upload": upload, "verify": {"href": f"{site.hub_origin}/lfs/verify"}}
    return answer


def _check_records(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise HubFailure(400, "Expected a list of objects")
    return value
