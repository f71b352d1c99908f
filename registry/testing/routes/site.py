"""State and lookups that the loopback Hub's routes share."""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.testing.faults import Faults
from registry.testing.store import Commit, HubFailure, Repo, Store
from registry.testing.wire import Request

__all__ = ["Site"]


@dataclass
class Site:
    """One loopback Hub, as its routes see it."""

    store: Store = field(default_factory=Store)
    faults: Faults = field(default_factory=Faults)
    #: Origin of the Hub (``http://127.0.0.1:<port>``), and the second one, where large files are stored.
    hub_origin: str = ""
    storage_origin: str = ""
    #: Entries of a listing per page.
    page_size: int = 1000
    #: Uploads larger than this many bytes are asked for in parts of this size.
    part_size: int = 64 * 1024 * 1024

    def repo(self, request: Request, *, write: bool = False, content: bool = False) -> Repo:
        """Return the repository in the request's path, if its sender has this kind of access."""
        return self.store.repo_for(request.parts["repo"], request.user, write=write, content=content)

    def commit(self, repo: Repo, revision: str) -> Commit:
        """Return the commit that ``revision`` names on this hub."""
        return repo.resolve(revision, tags=self.faults.resolves_tags)

    def branch(self, repo: Repo, revision: str) -> str:
        """Return the name of the branch (or pull request) to commit to."""
        name = "main" if revision == "HEAD" else revision.removeprefix("refs/heads/")
        if name not in repo.branches and name not in repo.pull_requests:
            raise HubFailure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name
