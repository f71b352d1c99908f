"""The loopback Hub's table of routes, and the function that runs them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from registry.testing.routes import files, repos, upload
from registry.testing.routes.site import Site
from registry.testing.store import HubFailure
from registry.testing.wire import Request, Response, failure

__all__ = ["ROUTES", "Route", "answer"]

_REPO = r"(?P<repo>[^/]+/[^/]+)"
# Clients quote the slashes of a revision; some do not quote those of refs/….
_REV = r"(?P<rev>refs/(?:pr|heads|tags|convert)/[^/]+|[^/]+)"
_PATH = r"(?P<path>.+)"
_SHA256 = r"(?P<sha256>[0-9a-f]{64})"


@dataclass(frozen=True)
class Route:
    """The function that answers a method and path; ``server`` is its origin."""

    methods: str
    pattern: str
    function: Callable[[Site, Request], Response]
    server: str = "hub"

    def match(self, request: Request) -> dict[str, str] | None:
        """Return the unquoted parts of the path if this is the route of ``request``."""
        if request.server != self.server or request.method not in self.methods.split():
            return None
        found = re.fullmatch(self.pattern, request.path)
        if found is None:
            return None
        return {name: unquote(value) for name, value in found.groupdict().items() if value is not None}


_API = f"/api/models/{_REPO}"

#: Names for ``Faults`` and for the request log.
ROUTES = {
    "whoami": Route("GET", "/api/whoami-v2", repos.whoami),
    "create_repo": Route("POST", "/api/repos/create", repos.create_repo),
    "delete_repo": Route("DELETE", "/api/repos/delete", repos.delete_repo),
    "validate_yaml": Route("POST", "/api/validate-yaml", upload.validate_yaml),
    "list_models": Route("GET", "/api/models", repos.list_models),
    "settings": Route("PUT", f"{_API}/settings", repos.settings),
    "info": Route("GET HEAD", f"{_API}(?:/revision/{_REV})?", repos.info),
    "refs": Route("GET", f"{_API}/refs", repos.refs),
    "tree": Route("GET", f"{_API}/tree/{_REV}(?:/{_PATH})?/?", repos.tree),
    "paths_info": Route("POST", f"{_API}/paths-info/{_REV}", repos.paths_info),
    "commits": Route("GET", f"{_API}/commits/{_REV}", repos.commits),
    "tag": Route("POST", f"{_API}/tag/{_REV}", repos.tag),
    "delete_tag": Route("DELETE", f"{_API}/tag/{_REV}", repos.delete_tag),
    "branch": Route("POST", f"{_API}/branch/{_REV}", repos.branch),
    "delete_branch": Route("DELETE", f"{_API}/branch/{_REV}", repos.delete_branch),
    "super_squash": Route("POST", f"{_API}/super-squash/{_REV}", repos.super_squash),
    "preupload": Route("POST", f"{_API}/preupload/{_REV}", upload.preupload),
    "commit": Route("POST", f"{_API}/commit/{_REV}", upload.commit),
    "xet_write_token": Route("GET", f"{_API}/xet-write-token/{_REV}", upload.xet_token),
    "xet_read_token": Route("GET", f"{_API}/xet-read-token/{_REV}", upload.xet_token),
    "lfs_batch": Route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", upload.lfs_batch),
    "lfs_complete": Route("POST", f"/lfs/{_SHA256}/complete", upload.lfs_complete),
    "lfs_verify": Route("POST", "/lfs/verify", upload.lfs_verify),
    "resolve": Route("GET HEAD", f"/{_REPO}/resolve/{_REV}/{_PATH}", files.resolve),
    "resolve_cache": Route("GET HEAD", f"/api/resolve-cache/models/{_REPO}/{_REV}/{_PATH}", files.resolve_cache),
    "raw": Route("GET HEAD", f"/{_REPO}/raw/{_REV}/{_PATH}", files.raw),
    "storage": Route("GET HEAD", f"/storage/{_SHA256}", files.storage, "storage"),
    "lfs_upload": Route("PUT", f"/storage/{_SHA256}", upload.lfs_upload, "storage"),
    "lfs_part": Route("PUT", rf"/storage/{_SHA256}/(?P<number>\d+)", upload.lfs_part, "storage"),
}


def answer(site: Site, request: Request, crashes: list[str]) -> Response:
    """Answer ``request``, with the faults that apply to it; tracebacks of this server's bugs go to ``crashes``."""
    route = _find(request)
    try:
        early = site.faults.before(request)
        if early is not None:
            return early
        if route is None:
            raise HubFailure(404, f"No such route: {request.method} {request.path}")
        if route.server == "hub":
            request.user = site.store.user_of(request.headers.get("Authorization"))
        moved = site.store.renamed.get(request.parts.get("repo", ""))
        response = route.function(site, request) if moved is None else _redirect(request, moved)
    except HubFailure as error:
        response = failure(error)
    except Exception:
        crashes.append(traceback.format_exc())
        # Not a 5xx: clients retry those for up to half a minute.
        response = Response.of({"error": "The loopback Hub has a bug; see LoopbackHub.crashes"}, 400)
    return site.faults.after(request, response)


def _redirect(request: Request, name: str) -> Response:
    """Redirect a request for a renamed repository to its present name."""
    return Response(307, b"", {"Location": request.target.replace(request.parts["repo"], name, 1)})


def _find(request: Request) -> Route | None:
    for name, route in ROUTES.items():
        parts = route.match(request)
        if parts is not None:
            request.route, request.parts = name, parts
            return route
    return None
