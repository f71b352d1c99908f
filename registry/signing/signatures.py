"""Sign the manifest of a release, and verify signatures.

A signature covers a folder with one file, ``<org>/<name>/adapter_manifest.json``. The manifest has the version and the
sha256 of every other file, and the path has the name of the repository, so a signature is valid for one release only.
It is a Sigstore bundle as OpenSSF's model-signing writes it, which model-signing's own command verifies, too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.disk.machine import lacks_something, temporary_folder
from registry.errors import (
    CommitNotFound,
    HubFileNotFound,
    InvalidKey,
    InvalidSignature,
    MachineError,
    RegistryError,
    SignatureError,
    SignatureMismatch,
    UnknownSigner,
)
from registry.formats.paths import MANIFEST_FILE, SIGNATURE_FILE
from registry.formats.references import check_name
from registry.formats.strict_json import JsonRefused, parse
from registry.hubs.protocol import Hub
from registry.signing.keys import Keys, SigningKey, TrustedKey, read_certificate

if TYPE_CHECKING:
    from model_signing import hashing

__all__ = ["MAX_SIGNATURE", "check_own_signature", "read_signature", "sign_manifest", "verify_signature"]

#: Most bytes of a signature; one with a chain of certificates has about 10 KB.
MAX_SIGNATURE = 256 * 1024
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_ENVELOPE = "application/vnd.in-toto+json"


def sign_manifest(name: str, manifest: bytes, key: SigningKey) -> bytes:
    """Return the signature of a release.

    Args:
        name: ``org/name``.
        manifest: The bytes of its manifest.
        key: The key to sign with.

    Raises:
        InvalidKey: The key cannot be used.
        SigningNotInstalled: model-signing is not installed.
    """
    config = key.configure().set_hashing_config(_configure_hashing())
    with _stage(name, manifest) as (folder, signature):
        try:
            config.sign(folder, signature)
        except Exception as error:
            if (lack := lacks_something(error)) is not None:
                raise lack from None
            raise InvalidKey(f"{key.private_key!r} cannot sign: {type(error).__name__}: {error}") from None
        return signature.read_bytes()


def verify_signature(name: str, manifest: bytes, signature: bytes, keys: Keys) -> None:
    """Check that one of these keys has signed this manifest for this repository.

    Args:
        name: ``org/name``.
        manifest: The bytes of the manifest.
        signature: The signature.
        keys: Keys whose signature is accepted.

    Raises:
        InvalidSignature: It is malformed, or was tampered with.
        UnknownSigner: It was made with another key.
        SignatureMismatch: It is the signature of another release.
        SigningNotInstalled: model-signing is not installed.
        MachineError: Temporary files cannot be written.
    """
    bundle = _read_bundle(signature)
    problems: list[SignatureError] = []
    for key in keys.trusted:
        problem = _find_problem(name, manifest, signature, bundle, key)
        if problem is None:
            return
        problems.append(problem)
    # With several keys, the problem of the one that signed is worth more than "made with another key".
    raise next((each for each in problems if not isinstance(each, UnknownSigner)), problems[0])


def read_signature(hub: Hub, name: str, commit: str) -> bytes | None:
    """Read the signature in a commit; ``None`` if it has none."""
    try:
        return hub.read(name, commit, SIGNATURE_FILE, MAX_SIGNATURE)
    except (HubFileNotFound, CommitNotFound):
        return None


def check_own_signature(name: str, manifest: bytes, signature: bytes, key: SigningKey) -> None:
    """Check that this key has made a signature for this release before.

    A signer with a certificate need not have the root that users trust, so the key's own certificate is compared.

    Raises:
        SignatureError: It was made with another key, or for another release.
    """
    if key.certificate is None:
        with temporary_folder() as folder:
            public = folder / "public.pem"
            public.write_bytes(key.public_pem())
            verify_signature(name, manifest, signature, Keys((TrustedKey(public, certificate=False),)))
        return
    bundle = _read_bundle(signature)
    certificates = bundle["verificationMaterial"].get("x509CertificateChain", {}).get("certificates") or [{}]
    if certificates[0].get("rawBytes") != read_certificate(key.certificate):
        raise UnknownSigner(f"The signature of {name} was made with another key than {key.private_key}")
    if not _states(bundle, name, manifest):
        raise SignatureMismatch(_describe_other(name, bundle))


def _find_problem(
    name: str, manifest: bytes, signature: bytes, bundle: dict[str, Any], key: TrustedKey
) -> SignatureError | None:
    verifier = key.configure().set_hashing_config(_configure_hashing())
    from cryptography.exceptions import InvalidSignature as NotSigned
    from OpenSSL.crypto import X509StoreContextError

    what = f"The signature of {name}"
    stranger = UnknownSigner(f"{what} was made with another key than {key.path}")
    material = bundle["verificationMaterial"]
    if key.certificate != ("x509CertificateChain" in material):
        return stranger
    if not key.certificate and material["publicKey"]["hint"] != key.fingerprint():
        return stranger
    try:
        with _stage(name, manifest) as (folder, file):
            file.write_bytes(signature)
            verifier.verify(folder, file)
    except RegistryError:
        raise
    except NotSigned:
        return InvalidSignature(f"{what} was tampered with: it is not what {key.path} signed")
    except X509StoreContextError as error:
        return UnknownSigner(f"{what} was made with a certificate that {key.path} does not certify: {error}")
    except Exception as error:
        if (lack := lacks_something(error)) is not None:
            raise MachineError(f"{what} cannot be verified: {lack.strerror or lack}") from error
        if not _states(bundle, name, manifest):
            return SignatureMismatch(_describe_other(name, bundle))
        return InvalidSignature(f"{what} cannot be verified: {type(error).__name__}: {str(error)[:300]}")
    # model-signing 1.1.1 accepts a statement that leaves paths out or names other algorithms; ours must be complete.
    return None if _states(bundle, name, manifest) else SignatureMismatch(_describe_other(name, bundle))


def _read_bundle(signature: bytes) -> dict[str, Any]:
    """Parse an untrusted signature strictly, which the library does not do."""
    try:
        bundle: dict[str, Any] = parse(signature, MAX_SIGNATURE)
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        if bundle["mediaType"] != _BUNDLE or envelope["payloadType"] != _ENVELOPE:
            raise JsonRefused("it is of a kind that is not known")
        if len(envelope["signatures"]) != 1 or not isinstance(envelope["signatures"][0]["sig"], str):
            raise JsonRefused("it must hold one signature")
        if "x509CertificateChain" not in material and not isinstance(material["publicKey"]["hint"], str):
            raise JsonRefused("it does not say which key made it")
        bundle["statement"] = parse(base64.b64decode(envelope["payload"], validate=True), MAX_SIGNATURE)
        bundle["statement"]["predicate"]["resources"][0]["name"].strip()
    except JsonRefused as reason:
        raise InvalidSignature(f"The signature is malformed: {reason}") from None
    except (KeyError, IndexError, TypeError, AttributeError, binascii.Error, ValueError) as error:
        raise InvalidSignature(f"The signature is malformed ({type(error).__name__})") from None
    return bundle


def _states(bundle: dict[str, Any], name: str, manifest: bytes) -> bool:
    """Whether a statement is about this manifest of this repository, and nothing else."""
    statement = bundle["statement"]
    resource = {
        "name": f"{name}/{MANIFEST_FILE}",
        "algorithm": "sha256",
        "digest": hashlib.sha256(manifest).hexdigest(),
    }
    return (
        statement.get("_type") == _STATEMENT
        and statement.get("predicateType") == _PREDICATE
        and statement["predicate"]["resources"] == [resource]
    )


def _describe_other(name: str, bundle: dict[str, Any]) -> str:
    named = str(bundle["statement"]["predicate"]["resources"][0]["name"]).removesuffix(f"/{MANIFEST_FILE}")
    other = "another release of it" if named == name else f"{named[:200]!a}"
    return f"The signature that lies beside the manifest of {name} is not this release's: it is that of {other}"


@contextmanager
def _stage(name: str, manifest: bytes) -> Iterator[tuple[Path, Path]]:
    """Make a folder with the manifest as it is signed, and a path beside it for the signature."""
    with temporary_folder() as parent:
        folder = parent / "release"
        place = folder.joinpath(*check_name(name).split("/"))
        place.mkdir(parents=True)
        (place / MANIFEST_FILE).write_bytes(manifest)
        yield folder, parent / "signature"


def _configure_hashing() -> hashing.Config:
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", max_workers=1)
    return config.set_ignored_paths(paths=(), ignore_git_paths=False)
