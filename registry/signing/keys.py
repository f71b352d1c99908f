"""PEM keys and certificates that make and verify signatures."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import InvalidKey, SigningNotInstalled

if TYPE_CHECKING:
    from model_signing import signing, verifying

__all__ = [
    "PASSWORD_VARIABLE",
    "SIGNATURE_VARIABLE",
    "Keys",
    "PathOrPaths",
    "SigningKey",
    "TrustedKey",
    "load_library",
    "read_certificate",
]

PathOrPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Environment variable with the key files that must have signed, for calls that name none; separated as in ``PATH``.
SIGNATURE_VARIABLE = "LORA_REGISTRY_REQUIRE_SIGNATURE"
#: Environment variable with the password of an encrypted key, for the commands.
PASSWORD_VARIABLE = "LORA_REGISTRY_KEY_PASSWORD"  # noqa: S105 - a name, not a password
_MAX_PEM = 1024 * 1024
_KINDS = "an ECDSA key on the curve P-256, P-384 or P-521"


def load_library() -> Any:
    """Import OpenSSF's model-signing, which the extra ``signing`` installs, and return it.

    Raises:
        SigningNotInstalled: It is not installed.
    """
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise SigningNotInstalled(
            f"Signatures need the package model-signing ({error}): pip install 'lora-plugins[signing]'"
        ) from None
    return model_signing


@dataclass(frozen=True)
class SigningKey:
    """A private key to sign with, and its certificate, if there is one.

    Attributes:
        private_key: PEM file with an ECDSA key on P-256, P-384 or P-521.
        certificate: PEM file with the certificate of the key; without one, users verify with the public key.
        chain: PEM files with the certificates between that one and the one that users trust.
        password: Password of an encrypted key; not supported with a certificate.
    """

    private_key: str | os.PathLike[str]
    certificate: str | os.PathLike[str] | None = None
    chain: tuple[str | os.PathLike[str], ...] = ()
    password: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, key: SigningKey | str | os.PathLike[str]) -> SigningKey:
        """Return the key, which is given as such or as the path of its file."""
        return key if isinstance(key, SigningKey) else cls(key)

    def configure(self) -> signing.Config:
        """Load the key into the library's configuration.

        Raises:
            InvalidKey: A file cannot be read or has the wrong content, or the files do not belong together.
            SigningNotInstalled: model-signing is not installed.
        """
        library = load_library()
        for path in (self.private_key, self.certificate, *self.chain):
            if path is not None:
                read_pem(path)
        config: signing.Config = library.signing.Config()
        try:
            if self.certificate is None:
                # model-signing 1.1.1 declares it as text and passes it on to cryptography, which takes bytes.
                password: Any = None if self.password is None else self.password.encode()
                return config.use_elliptic_key_signer(private_key=self.private_key, password=password)
            # model-signing 1.1.1 rejects an empty chain, so a certificate right below the root is its own chain.
            chain = self.chain or (self.certificate,)
            return config.use_certificate_signer(
                private_key=self.private_key, signing_certificate=self.certificate, certificate_chain=chain
            )
        except Exception as error:  # of cryptography, OpenSSL or the library; what each raises is not documented
            raise InvalidKey(
                f"{os.fspath(self.private_key)!r} cannot sign: {_describe(error)}. It must be {_KINDS}, in PEM, and "
                "the certificate, if there is one, that of this key"
            ) from None

    def public_pem(self) -> bytes:
        """Return the public key as PEM."""
        from cryptography.hazmat.primitives import serialization

        password = None if self.password is None else self.password.encode()
        public = serialization.load_pem_private_key(read_pem(self.private_key), password).public_key()
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True)
class TrustedKey:
    """A public key, or a root certificate, whose signatures are accepted.

    Attributes:
        path: The PEM file.
        certificate: Whether it holds certificates; then every key that they certify, directly or not, is trusted.
    """

    path: Path
    certificate: bool

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TrustedKey:
        """Read what a PEM file holds.

        Raises:
            InvalidKey: It holds neither a public key nor a certificate, or one that cannot be used.
        """
        data = read_pem(path)
        if b"PRIVATE KEY-----" in data:
            raise InvalidKey(
                f"{os.fspath(path)!r} holds a private key. Who verifies needs the public one: "
                "openssl pkey -in KEY -pubout"
            )
        certificate = b"-----BEGIN CERTIFICATE-----" in data
        if not certificate and b"-----BEGIN PUBLIC KEY-----" not in data:
            raise InvalidKey(f"{os.fspath(path)!r} must hold a public key or a certificate in PEM")
        found = cls(Path(path), certificate)
        found.configure()
        return found

    def configure(self) -> verifying.Config:
        """Load the key into the library's configuration.

        Raises:
            InvalidKey: It cannot be used.
            SigningNotInstalled: model-signing is not installed.
        """
        config: verifying.Config = load_library().verifying.Config()
        try:
            if self.certificate:
                return config.use_certificate_verifier(certificate_chain=[self.path])
            return config.use_elliptic_key_verifier(public_key=self.path)
        except Exception as error:
            raise InvalidKey(f"{str(self.path)!r} cannot verify: {_describe(error)}. It must be {_KINDS}") from None

    def fingerprint(self) -> str:
        """Return the sha256 by which a signature names its public key."""
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_public_key(read_pem(self.path))
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(pem).hexdigest()


@dataclass(frozen=True)
class Keys:
    """Trusted keys and certificates, one of which must have signed."""

    trusted: tuple[TrustedKey, ...]

    @classmethod
    def read(cls, paths: PathOrPaths | None) -> Keys | None:
        """Read key files; ``None`` stands for those of ``LORA_REGISTRY_REQUIRE_SIGNATURE``.

        Returns:
            The keys; ``None`` if no signature is required.

        Raises:
            InvalidKey: No key is given, or one cannot be used.
        """
        setting = os.environ.get(SIGNATURE_VARIABLE)
        if paths is None and not setting:
            return None
        if paths is None:
            return cls._read_setting(str(setting))
        named: Iterable[str | os.PathLike[str]] = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        trusted = tuple(TrustedKey.read(path) for path in named)
        if not trusted:
            raise InvalidKey("A signature is required and no key is given whose signature would do")
        return cls(trusted)

    @classmethod
    def _read_setting(cls, setting: str) -> Keys | None:
        try:
            return cls.read(tuple(filter(None, setting.split(os.pathsep))))
        except InvalidKey as error:
            raise InvalidKey(f"{SIGNATURE_VARIABLE}: {error}") from None

    def __str__(self) -> str:
        return " or ".join(str(key.path) for key in self.trusted)


def read_pem(path: str | os.PathLike[str]) -> bytes:
    """Read a key or certificate file.

    Raises:
        InvalidKey: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_PEM)
    except OSError as error:
        raise InvalidKey(f"{os.fspath(path)!r} cannot be read: {error.strerror or error}") from None


def read_certificate(path: str | os.PathLike[str]) -> str:
    """Read the first certificate of a file as signatures hold it: DER in base64."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    certificate = x509.load_pem_x509_certificate(read_pem(path))
    return base64.b64encode(certificate.public_bytes(Encoding.DER)).decode("ascii")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
