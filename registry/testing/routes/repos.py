"""Routes about accounts, repositories, refs and listings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qs, urlencode

from registry.testing.routes.site import Site
from registry.testing.store import Commit, Entry, HubFailure, Repo, User
from registry.testing.wire import Request, Response

__all__ = [
    "branch",
    "commits",
    "create_repo",
    "delete_branch",
    "delete_repo",
    "delete_tag",
    "info",
    "list_models",
    "paths_info",
    "refs",
    "settings",
    "super_squash",
    "tag",
    "tree",
    "whoami",
]


def whoami(site: Site, request: Request) -> Response:
    user = _require_user(request)
    orgs = [{"type": "org", "name": name, "fullname": name, "isEnterprise": False} for name in user.orgs]
    token = {"displayName": "loopback", "role": user.role}
    return Response.of({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})


def create_repo(site: Site, request: Request) -> Response:
    user, wanted = _require_user(request), request.json()
    namespace = str(wanted.get("organization") or user.name)
    repo_id = f"{namespace}/{wanted.get('name')}"
    if wanted.get("type") not in (None, "model"):
        raise HubFailure(400, "This hub has model repositories only")
    if not user.may_write(namespace):
        raise HubFailure(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
    url = f"{site.hub_origin}/{repo_id}"
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    try:
        repo = site.store.create_repo(repo_id, private=private)
    except HubFailure as error:
        error.extra["url"] = url
        raise
    return Response.of({"url": url, "name": repo_id, "id": repo.key})


def delete_repo(site: Site, request: Request) -> Response:
    user, wanted = _require_user(request), request.json()
    repo_id = f"{wanted.get('organization') or user.name}/{wanted.get('name')}"
    site.store.repo_for(repo_id, user, write=True)
    with site.store.lock:
        del site.store.repos[repo_id]
    return Response.of({})


def settings(site: Site, request: Request) -> Response:
    repo, wanted = site.repo(request, write=True), request.json()
    if "gated" in wanted:
        repo.gated = wanted["gated"] not in (False, "false")
    if "visibility" in wanted or "private" in wanted:
        repo.private = wanted.get("visibility") == "private" or wanted.get("private") is True
    return Response.of({})


def info(site: Site, request: Request) -> Response:
    repo = site.repo(request)
    commit = site.commit(repo, request.parts.get("rev", "main"))
    return Response.of(_describe_model(site, repo, commit, blobs=bool(request.query.get("blobs"))))


def list_models(site: Site, request: Request) -> Response:
    query = parse_qs(request.target.partition("?")[2])
    wanted = set(query.get("filter", []))
    found = []
    for repo in sorted(site.store.repos.values(), key=lambda repo: repo.id):
        member = request.user is not None and request.user.belongs_to(repo.namespace)
        model = _describe_model(site, repo, repo.resolve("main"), blobs=False)
        seen = (member or not repo.private) and query.get("author", [repo.namespace]) == [repo.namespace]
        if seen and query.get("search", [""])[0] in repo.id and wanted <= set(_check_strings(model["tags"])):
            found.append(model)
    return _make_page(site, request, found, limit=int(query.get("limit", ["1000"])[0]))


def refs(site: Site, request: Request) -> Response:
    repo = site.repo(request)

    def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in list(names.items())]

    answer = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    if request.query.get("include_prs"):
        answer["pullRequests"] = listed(repo.pull_requests, "")
    return Response.of(answer)


def tag(site: Site, request: Request) -> Response:
    repo = site.repo(request, write=True)
    site.store.create_ref(repo, "tag", str(request.json().get("tag")), request.parts["rev"])
    return Response.of({})


def delete_tag(site: Site, request: Request) -> Response:
    site.store.delete_ref(site.repo(request, write=True), "tag", request.parts["rev"])
    return Response.of({})


def branch(site: Site, request: Request) -> Response:
    repo = site.repo(request, write=True)
    start = str(request.json().get("startingPoint") or "main")
    site.store.create_ref(repo, "branch", request.parts["rev"], start)
    return Response.of({})


def delete_branch(site: Site, request: Request) -> Response:
    site.store.delete_ref(site.repo(request, write=True), "branch", request.parts["rev"])
    return Response.of({})


def super_squash(site: Site, request: Request) -> Response:
    """Rewrite a branch as one commit without a parent."""
    repo = site.repo(request, write=True)
    with site.store.lock:
        name = site.branch(repo, request.parts["rev"])
        title = str(request.json().get("message") or f"Super-squash branch '{name}'")
        files = repo.resolve(name).files
        site.store.write_commit(repo, name, files, title=title, author=_require_user(request).name, orphan=True)
    return Response.of({})


def tree(site: Site, request: Request) -> Response:
    repo = site.repo(request)
    commit = site.commit(repo, request.parts["rev"])
    folder = request.parts.get("path") or ""
    entries = _list_tree_entries(commit, folder, recursive=request.query.get("recursive") in ("true", "True", "1"))
    if folder and not entries:
        raise HubFailure(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
    entries += [_describe_file(path, _invent_entry(site)) for path in site.faults.listing]
    return _make_page(site, request, entries, limit=int(request.query.get("limit", site.page_size)))


def paths_info(site: Site, request: Request) -> Response:
    repo = site.repo(request)
    commit = site.commit(repo, request.parts["rev"])
    if "json" in (request.headers.get("Content-Type") or ""):
        paths = _check_strings(request.json().get("paths"))
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    found: list[object] = []
    for path in paths:
        if path in commit.files:
            found.append(_describe_file(path, commit.files[path]))
        elif any(name.startswith(f"{path.rstrip('/')}/") for name in commit.files):
            found.append({"type": "directory", "path": path.rstrip("/"), "oid": commit.oid, "size": 0})
    return Response.of(found)


def commits(site: Site, request: Request) -> Response:
    repo = site.repo(request)
    history = repo.history(site.commit(repo, request.parts["rev"]))
    listed = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in history
    ]
    answer = _make_page(site, request, listed, limit=int(request.query.get("limit", 50)))
    answer.headers["X-Total-Count"] = str(len(history))
    return answer


def _require_user(request: Request) -> User:
    if request.user is None:
        raise HubFailure(401, "Invalid username or password.")
    return request.user


def _describe_model(site: Site, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, object]:
    siblings = [_describe_sibling(path, entry, blobs=blobs) for path, entry in sorted(commit.files.items())]
    siblings += [_describe_sibling(path, _invent_entry(site), blobs=blobs) for path in site.faults.listing]
    return {
        "_id": repo.key,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _read_card_tags(site, commit),
        "createdAt": repo.created,
        "lastModified": commit.date,
        "siblings": siblings,
    }


def _read_card_tags(site: Site, commit: Commit) -> list[str]:
    """Return the tags that the Hub derives from a card's front matter, for the two keys that adapters are found by."""
    if "README.md" not in commit.files:
        return []
    lines = site.store.blobs[commit.files["README.md"].sha256].decode("utf-8", "replace").split("\n")
    if lines[0].strip() != "---" or "---" not in lines[1:]:
        return []
    tags, key = [], ""
    for line in lines[1 : lines.index("---", 1)]:
        if line.startswith("- "):
            value = line[2:]
        elif ":" in line and not line.startswith(" "):
            key, _, value = line.partition(":")
        else:
            continue
        value = value.strip().strip("'\"")
        if value and key == "tags":
            tags.append(value)
        elif value and key == "base_model":
            tags += [f"base_model:{value}", f"base_model:adapter:{value}"]
    return tags


def _describe_sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": path}
    if blobs:
        sibling.update(size=entry.size, blobId=entry.blob_id)
        if entry.lfs:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return sibling


def _list_tree_entries(commit: Commit, folder: str, *, recursive: bool) -> list[object]:
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    entries: list[object] = []
    folders: set[str] = set()
    for path, entry in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        names = path.removeprefix(prefix).split("/")
        parents = [prefix + "/".join(names[: depth + 1]) for depth in range(len(names) - 1)]
        for parent in parents if recursive else parents[:1]:
            if parent not in folders:
                folders.add(parent)
                entries.append({"type": "directory", "path": parent, "oid": commit.oid, "size": 0})
        if recursive or not parents:
            entries.append(_describe_file(path, entry))
    return entries


def _describe_file(path: str, entry: Entry) -> dict[str, object]:
    file: dict[str, object] = {"type": "file", "path": path, "oid": entry.blob_id, "size": entry.size}
    if entry.lfs:
        file["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return file


def _invent_entry(site: Site) -> Entry:
    return site.store.entry(b"hostile\n", lfs=False)


def _make_page(site: Site, request: Request, items: Sequence[object], *, limit: int) -> Response:
    """Return one page of ``items``, with the address of the next one in a ``Link`` header, as the Hub does."""
    size = max(1, min(limit, site.page_size))
    start = int(request.query.get("cursor", 0))
    answer = Response.of(list(items[start : start + size]))
    if start + size < len(items):
        following = urlencode({**request.query, "cursor": start + size})
        answer.headers["Link"] = f'<{site.hub_origin}{request.path}?{following}>; rel="next"'
    return answer


def _check_strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise HubFailure(400, f"Expected a list of strings: {json.dumps(value)}")
    return list(value)
