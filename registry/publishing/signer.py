"""Sign a release while publishing it, and check the published signature."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from registry.errors import SignatureError, VersionExists
from registry.formats.manifest import Manifest
from registry.hubs.protocol import Hub
from registry.publishing.changes import Published
from registry.signing.keys import SigningKey
from registry.signing.signatures import check_own_signature, read_signature, sign_manifest

__all__ = ["Signer"]


@dataclass(frozen=True)
class Signer:
    """Signs the manifests of one repository; each only once, because two signatures of the same bytes differ."""

    name: str
    key: SigningKey
    _made: dict[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, name: str, key: SigningKey | str | os.PathLike[str] | None) -> Signer | None:
        """Return a signer for this key, which is checked immediately; ``None`` without a key.

        Raises:
            InvalidKey: The key cannot be used.
            SigningNotInstalled: The signing library is not installed.
        """
        if key is None:
            return None
        signer = cls(name, SigningKey.of(key))
        signer.key.configure()
        return signer

    def __call__(self, manifest: Manifest) -> bytes:
        """Return the signature of a manifest."""
        if manifest.digest not in self._made:
            self._made[manifest.digest] = sign_manifest(self.name, manifest.to_bytes(), self.key)
        return self._made[manifest.digest]

    def check(self, hub: Hub, done: Published) -> Published:
        """Return a release if it is published with a signature of this key.

        Raises:
            VersionExists: It was published before without a signature, or with another key's.
        """
        found = read_signature(hub, self.name, done.commit)
        if found and found == self._made.get(done.manifest.digest):
            return done
        try:
            if found:
                check_own_signature(self.name, done.manifest.to_bytes(), found, self.key)
                return done
            reason = "without a signature"
        except SignatureError as error:
            reason = f"with another signature ({error})"
        raise VersionExists(
            f"{done} is published with this content {reason}, and stays as it is. To have it signed, publish it as "
            'another version, for example version="patch"'
        )
