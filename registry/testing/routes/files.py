"""Download routes: resolve, the two targets of its redirects, and raw."""

from __future__ import annotations

import re
from urllib.parse import quote

from registry.testing.routes.site import Site
from registry.testing.store import Commit, Entry, HubFailure
from registry.testing.wire import Request, Response

__all__ = ["raw", "resolve", "resolve_cache", "storage"]

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def resolve(site: Site, request: Request) -> Response:
    """Redirect to a file's bytes, with their metadata in headers."""
    commit, path, entry = _locate(site, request)
    headers = _make_metadata(commit, entry)
    if site.faults.xet_cas_url is not None and entry.lfs:
        repo = request.parts["repo"]
        headers["X-Xet-Hash"] = entry.sha256
        headers["Link"] = f'<{site.hub_origin}/api/models/{repo}/xet-read-token/{commit.oid}>; rel="xet-auth"'
    if entry.lfs:
        site.faults.name_storage(entry.sha256, path)
        headers["Location"] = f"{site.storage_origin}/storage/{entry.sha256}?X-Amz-Signature=loopback"
        return Response(302, b"", headers)
    repo = request.parts["repo"]
    headers["Location"] = f"/api/resolve-cache/models/{repo}/{commit.oid}/{quote(path, safe='')}"
    return Response(307, b"", headers)


def resolve_cache(site: Site, request: Request) -> Response:
    """Return the bytes of a file that git stores itself."""
    commit, _, entry = _locate(site, request)
    return _send_bytes(site, request, entry, _make_metadata(commit, entry))


def raw(site: Site, request: Request) -> Response:
    """Return a file as git stores it: for LFS files, the pointer."""
    commit, _, entry = _locate(site, request)
    content = site.store.blobs[entry.sha256]
    if entry.lfs:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{entry.sha256}", f"size {entry.size}", "")
        content = "\n".join(lines).encode()
    return Response(200, content, {"X-Repo-Commit": commit.oid, "Content-Type": "text/plain; charset=utf-8"})


def storage(site: Site, request: Request) -> Response:
    """Return the bytes of an LFS object from the second origin, to whoever has the (signed) address."""
    sha256 = request.parts["sha256"]
    if sha256 not in site.store.blobs:
        raise HubFailure(404, "The specified key does not exist.")
    entry = Entry(sha256, len(site.store.blobs[sha256]), sha256, lfs=True)
    return _send_bytes(site, request, entry, {"ETag": f'"{sha256}"'})


def _locate(site: Site, request: Request) -> tuple[Commit, str, Entry]:
    repo, path = site.repo(request, content=True), request.parts["path"]
    commit = site.commit(repo, request.parts["rev"])
    if path in site.faults.listing:
        return commit, path, site.store.entry(b"hostile\n", lfs=False)
    if path not in commit.files:
        error = HubFailure(404, "Entry not found", "EntryNotFound")
        error.headers["X-Repo-Commit"] = commit.oid
        raise error
    return commit, path, commit.files[path]


def _make_metadata(commit: Commit, entry: Entry) -> dict[str, str]:
    etag = entry.sha256 if entry.lfs else entry.blob_id
    return {
        "X-Repo-Commit": commit.oid,
        "X-Linked-Etag": f'"{etag}"',
        "X-Linked-Size": str(entry.size),
        "ETag": f'"{etag}"',
        "Accept-Ranges": "bytes",
    }


def _send_bytes(site: Site, request: Request, entry: Entry, headers: dict[str, str]) -> Response:
    """Return the content, or the requested range of it."""
    content = site.store.blobs[entry.sha256]
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = _RANGE.fullmatch(request.headers.get("Range") or "")
    if match is None or match.groups() == ("", ""):
        return _make_response(request, 200, content, headers)
    first, last = match.groups()
    start = max(0, len(content) - int(last)) if first == "" else int(first)
    stop = len(content) if first == "" or last == "" else min(len(content), int(last) + 1)
    if start >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return _make_response(request, 206, content[start:stop], headers)


def _make_response(request: Request, status: int, content: bytes, headers: dict[str, str]) -> Response:
    if request.method == "HEAD":
        return Response(status, b"", {**headers, "Content-Length": str(len(content))})
    return Response(status, content, headers)
