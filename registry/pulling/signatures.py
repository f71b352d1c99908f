"""Read signatures from a hub, verify them, and keep them in the cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from registry.catalog.index import Release
from registry.disk import files as folder_files
from registry.errors import SignatureError, SignatureNotFound
from registry.formats.manifest import Manifest
from registry.hubs.protocol import Hub
from registry.pulling.cache import Cache
from registry.signing.keys import Keys, PathOrPaths
from registry.signing.signatures import MAX_SIGNATURE, read_signature, verify_signature

__all__ = ["SignatureRule"]


@dataclass(frozen=True)
class SignatureRule:
    """Requires that a release is signed with one of these keys.

    Attributes:
        keys: The keys.
        cache: Where signatures are kept.
    """

    keys: Keys
    cache: Cache

    @classmethod
    def choose(cls, required: PathOrPaths | None, cache: Cache) -> SignatureRule | None:
        """Return the rule for ``require_signature=``, or for the environment if that is ``None``.

        Returns:
            The rule; ``None`` if no signature is required.

        Raises:
            InvalidKey: No key is given, or one cannot be used.
        """
        keys = Keys.read(required)
        return None if keys is None else cls(keys, cache)

    def check(self, release: Release, manifest: Manifest, hub: Hub | None) -> None:
        """Verify the signature of a release before any of its files is downloaded or used.

        Args:
            release: The release.
            manifest: Its manifest; the hashes in it cover all its files.
            hub: The hub to read its signature from if the cache has no valid one; ``None`` without a network.

        Raises:
            SignatureError: It is missing, malformed, tampered with, made with another key, or another release's.
        """
        kept = self._read(release.name, manifest)
        if kept is not None:
            try:
                return self._verify(release, manifest, kept)
            except SignatureError:
                if hub is None:
                    raise
        if hub is None:
            raise SignatureNotFound(
                f"The signature of {release} is not in the cache {self.cache.folder}, and the network is off. Pull it "
                "once with a network and the required key"
            )
        found = read_signature(hub, release.name, release.commit)
        if found is None:
            raise SignatureNotFound(
                f"{release} on {hub.location} is not signed, and a signature by {self.keys} is required. A "
                "published release stays as it is: its owner can publish a new version with push --sign"
            )
        self._verify(release, manifest, found)
        self._keep(release.name, manifest, found)
        return None

    def _verify(self, release: Release, manifest: Manifest, signature: bytes) -> None:
        verify_signature(release.name, manifest.to_bytes(), signature, self.keys)

    def _find_path(self, name: str, manifest: Manifest) -> Path:
        file = f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.sig"
        return folder_files.inside(self.cache.folder, self.cache.folder / "signatures" / manifest.digest / file)

    def _read(self, name: str, manifest: Manifest) -> bytes | None:
        try:
            return folder_files.read_small(self._find_path(name, manifest), MAX_SIGNATURE + 1)
        except OSError:
            return None

    def _keep(self, name: str, manifest: Manifest, signature: bytes) -> None:
        try:
            path = self._find_path(name, manifest)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder_files.replace_file(path, signature)
        except OSError:
            return  # read-only cache: the signature is read from the hub again next time
