"""A small Hugging Face Hub on loopback, for tests.

It implements the part of the Hub's protocol by which the stock clients create, write, list, tag and read model
repositories, and can be told to misbehave (``hub.faults``). It listens on loopback addresses only and keeps
everything in memory. As a program, ``python -m registry.testing.loopback`` prints the endpoint and a token and serves
until stopped.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from registry.testing.faults import Faults
from registry.testing.routes import answer
from registry.testing.routes.site import Site
from registry.testing.store import Repo, User
from registry.testing.wire import Request, Response, Server

__all__ = ["LoopbackHub", "LoopbackHubCrash", "Served"]


class LoopbackHubCrash(AssertionError):
    """The loopback Hub itself failed while it served; holds the tracebacks."""


@dataclass(frozen=True)
class Served:
    """A request that the hub has answered."""

    route: str
    method: str
    path: str
    status: int
    #: Whether it carried an ``Authorization`` header. (Not the header: logs must not hold tokens.)
    authorized: bool
    #: ``"hub"`` or ``"storage"``.
    server: str


class LoopbackHub:
    """A Hub with one account, ``user``, that owns its own namespace and the organization ``org``.

    ``endpoint`` and ``token`` are what a client needs. ``requests`` lists what was served, oldest first. Use it as a
    context manager, or call ``start()`` and ``close()``; leaving the context raises ``LoopbackHubCrash`` if the server
    had a bug.
    """

    def __init__(self, *, user: str = "user", orgs: Iterable[str] = ("org",), port: int = 0) -> None:
        self._site = Site()
        self._port = port
        self._servers: list[Server] = []
        self.requests: list[Served] = []
        self.crashes: list[str] = []
        #: The account whose token is ``token``.
        self.user = self.add_user(user, orgs=orgs)

    def __repr__(self) -> str:
        return f"LoopbackHub({self.endpoint or 'not started'})"

    # -- lifetime ------------------------------------------------------------------------------------------------

    def start(self) -> LoopbackHub:
        """Listen; both ports are free ones chosen by the system unless ``port`` was given for the Hub's."""
        # Two host names, as on the real Hub: some clients treat another port of the same host as the same server, and
        # send it the token.
        for name, host, port in (("hub", "127.0.0.1", self._port), ("storage", "localhost", 0)):
            server = Server(name, self._answer, host, port)
            self._servers.append(server)
            # Polled often, so that closing takes 20 ms and not the default half second.
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._site.hub_origin, self._site.storage_origin = (server.origin for server in self._servers)
        return self

    def close(self) -> None:
        """Stop listening. What was stored stays readable through this object."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.crashes and error is None:
            raise LoopbackHubCrash("\n".join(self.crashes))

    # -- what clients need ---------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:<port>``, as ``HF_ENDPOINT`` or ``HfApi(endpoint=…)`` want it."""
        return self._site.hub_origin

    @property
    def storage_origin(self) -> str:
        """``http://localhost:<port>``, where large files are uploaded and to which their downloads are redirected."""
        return self._site.storage_origin

    @property
    def token(self) -> str:
        """The write token of ``user``."""
        return self.user.token

    @property
    def faults(self) -> Faults:
        """The hub's faults; none at first."""
        return self._site.faults

    # -- the content, without a client ---------------------------------------------------------------------------

    def add_user(self, name: str, *, orgs: Iterable[str] = (), role: str = "write") -> User:
        """Create another account; ``role="read"`` makes a token that cannot write."""
        return self._site.store.add_user(name, orgs=orgs, role=role)

    def repo(self, repo_id: str) -> Repo:
        """Return a stored repository: ``branches``, ``tags``, ``commits``, ``private``, ``gated``, ``readers``."""
        return self._site.store.repos[repo_id]

    def create_repo(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        """Create a repository without a client."""
        repo = self._site.store.create_repo(repo_id, private=private)
        repo.gated = gated
        return repo

    def commit(
        self, repo_id: str, files: Mapping[str, bytes | None], *, branch: str = "main", message: str = "a commit"
    ) -> str:
        """Commit without a client: ``files`` are added or replaced, those with ``None`` removed.

        A new branch starts from main. Returns the commit id.
        """
        store, repo = self._site.store, self.repo(repo_id)
        with store.lock:
            repo.branches.setdefault(branch, repo.branches["main"])
            content = dict(repo.resolve(branch).files)
            for path, data in files.items():
                content.pop(path, None)
                if data is not None:
                    lfs = store.wants_lfs(repo, branch, path, len(data), data[:512])
                    content[path] = store.entry(data, lfs=lfs)
            return store.write_commit(repo, branch, content, title=message, author=self.user.name).oid

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the bytes of a file as they are stored, unaffected by faults."""
        entry = self.repo(repo_id).resolve(revision).files[path]
        return self._site.store.blobs[entry.sha256]

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        """Return the paths of a commit, sorted."""
        return sorted(self.repo(repo_id).resolve(revision).files)

    def move_tag(self, repo_id: str, tag: str, revision: str) -> None:
        """Let a tag, new or existing, point at another commit, as its owner can on the real Hub."""
        repo = self.repo(repo_id)
        repo.tags[tag] = repo.resolve(revision).oid

    def delete_repo(self, repo_id: str) -> None:
        """Delete a repository, so that somebody else can register its name."""
        del self._site.store.repos[repo_id]

    def rename_repo(self, repo_id: str, new_id: str) -> None:
        """Rename a repository; requests with the former name are redirected, as on the real Hub."""
        store = self._site.store
        with store.lock:
            store.repos[new_id] = store.repos.pop(repo_id)
            store.repos[new_id].id = new_id
            store.renamed[repo_id] = new_id

    def set_page_size(self, entries: int) -> None:
        """Answer listings in pages of this many entries."""
        self._site.page_size = entries

    def set_part_size(self, size: int) -> None:
        """Request uploads of more than this many bytes in parts."""
        self._site.part_size = size

    # -- the log -------------------------------------------------------------------------------------------------

    def routes(self, matching: Callable[[Served], bool] | None = None) -> list[str]:
        """Return the names of the routes served so far, in order."""
        return [served.route for served in self.requests if matching is None or matching(served)]

    def leaks(self) -> list[Served]:
        """Return the requests that carried an ``Authorization`` header to the second origin; there should be none."""
        return [served for served in self.requests if served.server == "storage" and served.authorized]

    def _answer(self, request: Request) -> Response:
        response = answer(self._site, request, self.crashes)
        authorized = "Authorization" in request.headers
        served = Served(request.route, request.method, request.path, response.status, authorized, request.server)
        self.requests.append(served)
        return response


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted (or, with ``--until-eof``, until standard input is closed)."""
    parser = argparse.ArgumentParser(prog="python -m registry.testing.loopback", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="port of the Hub (default: a free one)")
    parser.add_argument("--user", default="user", help="name of the account (default: user)")
    parser.add_argument("--org", action="append", help="organization of the account; repeatable (default: org)")
    parser.add_argument("--until-eof", action="store_true", help="stop when standard input is closed")
    options = parser.parse_args(arguments)
    with LoopbackHub(user=options.user, orgs=options.org or ["org"], port=options.port) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}")
        print(f"HF_TOKEN={hub.token}", flush=True)
        try:
            if options.until_eof:
                sys.stdin.read()
            else:
                threading.Event().wait()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
