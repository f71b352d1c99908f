"""What the routes of the loopback Hub share."""

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
    #: ``http://127.0.0.1:<port>`` of the Hub, and of the origin that large files are kept at.
    hub_origin: str = ""
    storage_origin: str = ""
    #: Entries of a listing per page.
    page_size: int = 1000
    #: Uploads larger than this many bytes are asked for in parts of this size.
    part_size: int = 64 * 1024 * 1024

    def repo(self, request: Request, *, write: bool = False, content: bool = False) -> Repo:
        """The repository in the request's path, if its sender has this kind of access."""
        return self.store.repo_for(request.parts["repo"], request.user, write=write, content=content)

    def commit(self, repo: Repo, revision: str) -> Commit:
        """The commit that ``revision`` stands for on this hub."""
        return repo.resolve(revision, tags=self.faults.resolves_tags)

    def branch(self, repo: Repo, revision: str) -> str:
        """The name of the branch (or pull request) to commit to."""
        name = "main" if revision == "HEAD" else revision.removeprefix("refs/heads/")
        if name not in repo.branches and name not in repo.pull_requests:
            raise HubFailure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name
