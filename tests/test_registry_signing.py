"""Signed releases: who requires a signature gets what that key has signed, or an error of its own kind."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from releases import CONFIG, NAME, draft

pytest.importorskip("model_signing", reason="comes with the extra: pip install 'lora-plugins[signing]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from registry import SigningKey, collect_garbage, lock_adapters, mirror, pull_adapter, push_adapter, verify
from registry.errors import (
    InvalidKey,
    InvalidSignature,
    MachineError,
    SignatureError,
    SignatureMismatch,
    SignatureNotFound,
    SigningNotInstalled,
    UnknownSigner,
    VersionExists,
)
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST_FILE, SIGNATURE_FILE
from registry.pulling.cache import VARIABLE, Cache
from registry.signing.keys import SIGNATURE_VARIABLE, Keys
from registry.signing.signatures import sign_manifest, verify_signature
from registry.testing import LoopbackHub

PEM = serialization.Encoding.PEM


class KeyPair:
    """An ECDSA key with its files: private, public and, below an authority, a certificate."""

    def __init__(self, folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> None:
        self.key = ec.generate_private_key(curve or ec.SECP256R1())
        self.private, self.public, self.certificate = (folder / f"{name}.{end}" for end in ("key", "pub", "crt"))
        format_ = serialization.PrivateFormat.PKCS8
        self.private.write_bytes(self.key.private_bytes(PEM, format_, serialization.NoEncryption()))
        public = self.key.public_key()
        self.public.write_bytes(public.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))

    def certify(self, other: KeyPair, *, authority: bool = False, signing: bool = True) -> None:
        """Give another key a certificate."""
        now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, other.private.stem)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.private.stem)]))
            .public_key(other.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(signing, False, not signing, False, False, authority, authority, False, False),
                critical=True,
            )
        )
        other.certificate.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(PEM))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyPair]:
    folder = tmp_path_factory.mktemp("keys")
    found = {name: KeyPair(folder, name) for name in ("ours", "theirs", "root", "middle", "leaf", "useless")}
    found["root"].certify(found["root"], authority=True)
    found["root"].certify(found["middle"], authority=True)
    found["middle"].certify(found["leaf"])
    found["root"].certify(found["useless"], signing=False)
    found["theirs"].certify(found["theirs"], authority=True)
    return found


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    # PEFT takes ten seconds to load, for the defaults of its configuration.
    monkeypatch.setattr("registry.publishing.source._defaults", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path, timeout=30)


def adapter(tmp_path: Path, seed: int = 0) -> Path:
    folder = tmp_path / f"adapter-{seed}"
    folder.mkdir(exist_ok=True)
    files = draft("1.0.0", seed).files
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG))
    (folder / ADAPTER_WEIGHTS).write_bytes(bytes(files[ADAPTER_WEIGHTS]))  # type: ignore[arg-type]
    return folder


def push(place: Place, tmp_path: Path, key: Any, *, name: str = NAME, version: str = "1.0.0", seed: int = 0) -> Any:
    return push_adapter(adapter(tmp_path, seed), name, version=version, hub=place.hub, sign=key)


def pull(place: Place, key: Any, reference: str = NAME, **options: Any) -> Any:
    return pull_adapter(reference, hub=place.hub, require_signature=key, **options)


def signature_of(place: Place, name: str = NAME, version: str = "1.0.0") -> bytes:
    commit = place.hub.refs(name).tags[f"v{version}"]
    return place.hub.read(name, commit, SIGNATURE_FILE, 10**6)


def exchange(place: Place, content: bytes, *, name: str = NAME, file: str = SIGNATURE_FILE) -> None:
    """Serve another file in the commit of 1.0.0, as who owns the registry can."""
    if isinstance(place, LoopbackPlace):
        place.loopback.faults.replace(file, content)
        return
    assert isinstance(place, FolderPlace)
    (place.root / name / "commits" / place.hub.refs(name).tags["v1.0.0"] / file).write_bytes(content)


# -- what is right ---------------------------------------------------------------------------------------------------


def test_a_signed_release_is_pulled_by_who_requires_its_key(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    done = push(place, tmp_path, keys["ours"].private)
    pulled = pull(place, keys["ours"].public)
    assert pulled.manifest.digest == done.manifest.digest
    assert SIGNATURE_FILE not in os.listdir(pulled.path)  # a release is what its manifest lists
    assert pull(place, [keys["theirs"].public, keys["ours"].public]).commit == done.commit
    assert pull_adapter(NAME, hub=place.hub).commit == done.commit
    assert verify(NAME, hub=place.hub, require_signature=keys["ours"].public).ok
    assert verify(NAME, hub=place.hub).others == ()


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_the_larger_curves_sign_too(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    place, pair = FolderPlace(tmp_path / "registry"), KeyPair(tmp_path, "large", curve)
    push(place, tmp_path, pair.private)
    assert pull(place, pair.public).version == "1.0.0"


def test_an_encrypted_key_signs_with_its_password(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    place, secret = FolderPlace(tmp_path / "registry"), serialization.BestAvailableEncryption(b"s3cret")
    path = tmp_path / "encrypted.key"
    path.write_bytes(keys["ours"].key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret))
    for password in (None, "wrong"):
        with pytest.raises(InvalidKey, match="cannot sign"):
            push(place, tmp_path, SigningKey(path, password=password))
    key = SigningKey(path, password="s3cret")
    assert "s3cret" not in repr(key)
    assert push(place, tmp_path, key).created
    assert not push(place, tmp_path, key).created
    assert pull(place, keys["ours"].public).version == "1.0.0"


def test_a_certificate_below_the_trusted_one_will_do(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    key = SigningKey(keys["leaf"].private, keys["leaf"].certificate, (keys["middle"].certificate,))
    assert push(place, tmp_path, key).created
    assert pull(place, keys["root"].certificate).version == "1.0.0"
    assert not push(place, tmp_path, key).created
    for other in (keys["theirs"].certificate, keys["leaf"].public):
        with pytest.raises(UnknownSigner):
            pull(place, other)


def test_nothing_asks_the_network(tmp_path: Path, keys: dict[str, KeyPair], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, SigningKey(keys["leaf"].private, keys["leaf"].certificate, (keys["middle"].certificate,)))
    assert pull(place, keys["root"].certificate).version == "1.0.0"


def test_the_signature_goes_along_with_a_mirror(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    push(place, tmp_path, keys["ours"].private)
    push_adapter(adapter(tmp_path, 1), NAME, version="1.1.0", hub=place.hub)
    copy = FolderPlace(tmp_path / "copy")
    mirror(NAME, copy.hub, hub=place.hub)
    assert signature_of(copy) == signature_of(place)
    assert pull(copy, keys["ours"].public, f"{NAME}@1.0.0").version == "1.0.0"
    with pytest.raises(SignatureNotFound):
        pull(copy, keys["ours"].public, f"{NAME}@1.1.0")


def test_a_signature_is_kept_for_use_without_a_network(
    loopback_hub: LoopbackHub, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    place = LoopbackPlace(loopback_hub, timeout=30)
    push(place, tmp_path, keys["ours"].private)
    pull_adapter(NAME, hub=place.hub)
    with pytest.raises(SignatureNotFound, match="is not in the cache"):
        pull(place, keys["ours"].public, offline=True)
    pull(place, keys["ours"].public)
    assert pull(place, keys["ours"].public, offline=True).version == "1.0.0"
    with pytest.raises(UnknownSigner):
        pull(place, keys["theirs"].public, offline=True)
    loopback_hub.requests.clear()
    pull(place, keys["ours"].public)
    assert set(loopback_hub.routes()) == {"refs"}  # nothing is downloaded for a warm pull
    [kept] = Cache().folder.rglob("*.sig")
    kept.write_bytes(b"spoilt")
    with pytest.raises(InvalidSignature):
        pull(place, keys["ours"].public, offline=True)
    assert pull(place, keys["ours"].public).version == "1.0.0"  # asked for again


def test_garbage_collection_takes_the_signature_with_the_release(
    tmp_path: Path, keys: dict[str, KeyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    digest = pull(place, keys["ours"].public).manifest.digest
    place.delete(NAME)
    cache = Cache()
    cache.record_path(place.hub.location, NAME).unlink()
    monkeypatch.setattr(Cache, "is_leased", lambda self, digest: False)
    collect_garbage(place.hub, dry_run=False)
    assert not cache.path(digest).exists()
    assert not list(cache.folder.rglob("*.sig"))


# -- what is wrong ---------------------------------------------------------------------------------------------------


def _is_refused(place: Place, key: Any, error: type[SignatureError], says: str, reference: str = NAME) -> None:
    """A pull ends with the error, and neither cache nor lock file have anything afterwards."""
    releases = Cache().folder / "releases"
    before = sorted(releases.glob("*")) if releases.exists() else []
    with pytest.raises(error, match=says) as caught:
        pull(place, key, reference, lock=True)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()
    assert (sorted(releases.glob("*")) if releases.exists() else []) == before
    assert not Path("adapters.lock").exists()
    found = verify(reference, hub=place.hub, require_signature=key)
    assert not found.ok


def test_an_unsigned_release_is_refused(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    push_adapter(adapter(tmp_path), NAME, version="1.0.0", hub=place.hub)
    _is_refused(place, keys["ours"].public, SignatureNotFound, "is not signed.*push --sign")
    assert pull_adapter(NAME, hub=place.hub).version == "1.0.0"


def test_a_removed_signature_is_refused(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    push(place, tmp_path, keys["ours"].private)
    if isinstance(place, LoopbackPlace):
        place.move_tag(NAME, "v1.0.0", place.loopback.commit(NAME, {SIGNATURE_FILE: None}))
    else:
        assert isinstance(place, FolderPlace)
        commit = place.hub.refs(NAME).tags["v1.0.0"]
        (place.root / NAME / "commits" / commit / SIGNATURE_FILE).unlink()
    _is_refused(place, keys["ours"].public, SignatureNotFound, "is not signed")


def test_another_key_is_refused(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    push(place, tmp_path, keys["theirs"].private)
    _is_refused(place, keys["ours"].public, UnknownSigner, "was made with another key than")
    _is_refused(place, keys["root"].certificate, UnknownSigner, "was made with another key than")


def _change_payload(bundle: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


def _flip(bundle: dict[str, Any]) -> None:
    raw = bytearray(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    raw[-1] ^= 1
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes(raw)).decode()


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a bit of the signature": _flip,
    "another subject": lambda b: _change_payload(b, lambda s: s["subject"][0].update(name="x")),
    "another digest": lambda b: _change_payload(b, lambda s: s["predicate"]["resources"][0].update(digest="0" * 64)),
    "another repository": lambda b: _change_payload(
        b, lambda s: s["predicate"]["resources"][0].update(name=f"org/other/{MANIFEST_FILE}")
    ),
    "ignored paths": lambda b: _change_payload(
        b, lambda s: s["predicate"]["serialization"].update(ignore_paths=["org"])
    ),
    "another algorithm": lambda b: _change_payload(
        b, lambda s: s["predicate"]["resources"][0].update(algorithm="blake2")
    ),
    "no signatures": lambda b: b["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda b: b["dsseEnvelope"].update(signatures=b["dsseEnvelope"]["signatures"] * 2),
    "no key": lambda b: b["verificationMaterial"]["publicKey"].pop("hint"),
    "another kind of bundle": lambda b: b.update(mediaType="application/json"),
    "another kind of payload": lambda b: b["dsseEnvelope"].update(payloadType="text/plain"),
    "no payload": lambda b: b["dsseEnvelope"].pop("payload"),
    "a payload that is a list": lambda b: b["dsseEnvelope"].update(payload=base64.b64encode(b"[]").decode()),
    "a signature that is a number": lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=1),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_signature_is_refused(tmp_path: Path, keys: dict[str, KeyPair], case: str) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    bundle = json.loads(signature_of(place))
    TAMPERED[case](bundle)
    exchange(place, json.dumps(bundle).encode())
    _is_refused(place, keys["ours"].public, InvalidSignature, "tampered with|malformed")


def _sign(pair: KeyPair, bundle: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    """Sign another statement with the right key, as who has it but not our program can."""
    _change_payload(bundle, change)
    envelope = bundle["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    envelope["signatures"][0]["sig"] = base64.b64encode(pair.key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()


OTHER = {"name": f"org/other/{MANIFEST_FILE}", "algorithm": "sha256", "digest": "0" * 64}
STATEMENTS: dict[str, tuple[Callable[[dict[str, Any]], object], type[SignatureError]]] = {
    "another type of statement": (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), SignatureMismatch),
    "the predicate of an early release": (
        lambda s: s.update(predicateType="https://model_signing/Digests/v0.1", subject=[
            {"name": each["name"], "digest": {"sha256": each["digest"]}} for each in s["predicate"]["resources"]
        ]),
        SignatureMismatch,
    ),
    "an unknown predicate": (lambda s: s.update(predicateType="https://example.org/x"), SignatureMismatch),
    "another file besides": (lambda s: s["predicate"]["resources"].append(OTHER), SignatureMismatch),
    "another file instead": (lambda s: s["predicate"].update(resources=[OTHER]), SignatureMismatch),
    "no file": (lambda s: s["predicate"].update(resources=[]), InvalidSignature),
    "a file whose name is a number": (lambda s: s["predicate"]["resources"][0].update(name=1), InvalidSignature),
}  # fmt: skip


@pytest.mark.parametrize("case", STATEMENTS)
def test_the_right_key_on_a_statement_about_something_else_is_refused(
    tmp_path: Path, keys: dict[str, KeyPair], case: str
) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    bundle = json.loads(signature_of(place))
    _sign(keys["ours"], bundle, lambda statement: None)
    exchange(place, json.dumps(bundle).encode())
    assert pull(place, keys["ours"].public, cache_dir=tmp_path / "other").version == "1.0.0"  # so far it is right
    change, error = STATEMENTS[case]
    _sign(keys["ours"], bundle, change)
    exchange(place, json.dumps(bundle).encode())
    _is_refused(place, keys["ours"].public, error, "is not this release's|is malformed")


def test_a_signature_that_names_no_key_is_refused(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    for hint in (None, 1, ["x"]):
        bundle = json.loads(signature_of(place))
        bundle["verificationMaterial"]["publicKey"]["hint"] = hint
        exchange(place, json.dumps(bundle).encode())
        _is_refused(place, keys["ours"].public, InvalidSignature, "does not say which key made it")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"x" * 200_000, b'{"mediaType": NaN}'],
    ids=lambda content: ascii(content[:8]),
)
def test_a_signature_that_is_none_is_refused(tmp_path: Path, keys: dict[str, KeyPair], content: bytes) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    exchange(place, content)
    _is_refused(place, keys["ours"].public, InvalidSignature, "is malformed")


def test_the_signature_of_another_release_is_refused(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    """Of another version, of another repository with the same content, and of other content: all by the right key."""
    push(place, tmp_path, keys["ours"].private)
    push(place, tmp_path, keys["ours"].private, version="1.1.0", seed=1)
    push(place, tmp_path, keys["ours"].private, name="org/other")
    for name, version, says in ((NAME, "1.1.0", "another release of it"), ("org/other", "1.0.0", "org/other")):
        exchange(place, signature_of(place, name, version))
        _is_refused(place, keys["ours"].public, SignatureMismatch, says, f"{NAME}@1.0.0")
        if isinstance(place, LoopbackPlace):
            place.loopback.faults.clear()


def test_a_release_with_all_hashes_right_is_refused_at_the_first_pull(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    """What neither hashes nor a fresh machine can tell: the owner of the registry publishes something else."""
    push(place, tmp_path, keys["ours"].private)
    forged = draft("1.0.0", 7)
    files = {path: bytes(data) for path, data in forged.all_files().items()}  # type: ignore[arg-type]
    for path, data in files.items():
        exchange(place, data, file=path)
    assert pull_adapter(NAME, hub=place.hub, cache_dir=tmp_path / "fresh").manifest.digest == forged.manifest.digest
    _is_refused(place, keys["ours"].public, SignatureMismatch, "another release of it")


def test_a_certificate_that_may_not_sign_is_refused(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, SigningKey(keys["useless"].private, keys["useless"].certificate))
    _is_refused(place, keys["root"].certificate, InvalidSignature, "cannot be used for signing")


# -- keys, and pushing again -----------------------------------------------------------------------------------------


def test_keys_that_cannot_be_used_are_named_before_anything_is_published(
    tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    place = FolderPlace(tmp_path / "registry")
    rsa_key = rsa.generate_private_key(65537, 2048)
    private, public, text = tmp_path / "rsa.key", tmp_path / "rsa.pub", tmp_path / "text"
    private.write_bytes(rsa_key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(rsa_key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    text.write_text("no key")
    for key in (tmp_path / "missing", text, private, keys["ours"].public,
                SigningKey(keys["ours"].private, keys["leaf"].certificate)):  # fmt: skip
        says = "missing' cannot be read" if key == tmp_path / "missing" else "cannot sign"
        with pytest.raises(InvalidKey, match=says):
            push(place, tmp_path, key)
    assert not place.root.exists()
    push(place, tmp_path, keys["ours"].private)
    for key, says in ((tmp_path / "missing", "cannot be read"), (text, "must hold"), (public, "cannot verify"),
                      (keys["ours"].private, "holds a private key"), ([], "no key is given")):  # fmt: skip
        with pytest.raises(InvalidKey, match=says):
            pull(place, key)


def test_pushing_again_is_success_only_with_the_same_key(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    assert push(place, tmp_path, keys["ours"].private).created
    before = signature_of(place)
    assert not push(place, tmp_path, keys["ours"].private).created
    assert signature_of(place) == before
    with pytest.raises(VersionExists, match="with another signature"):
        push(place, tmp_path, keys["theirs"].private)
    push_adapter(adapter(tmp_path, 1), NAME, version="1.1.0", hub=place.hub)
    with pytest.raises(VersionExists, match="without a signature"):
        push(place, tmp_path, keys["ours"].private, version="1.1.0", seed=1)


def test_pushing_again_compares_the_certificate_and_what_it_has_signed(
    tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    place = FolderPlace(tmp_path / "registry")
    leaf = SigningKey(keys["leaf"].private, keys["leaf"].certificate, (keys["middle"].certificate,))
    other = SigningKey(keys["useless"].private, keys["useless"].certificate)
    push(place, tmp_path, leaf)
    assert not push(place, tmp_path, leaf).created
    with pytest.raises(VersionExists, match="was made with another key"):
        push(place, tmp_path, other)
    push(place, tmp_path, leaf, version="1.1.0", seed=1)
    before = signature_of(place)
    exchange(place, signature_of(place, version="1.1.0"))
    with pytest.raises(VersionExists, match="is that of another release"):
        push(place, tmp_path, leaf)
    exchange(place, before)
    assert not push(place, tmp_path, leaf).created
    push(place, tmp_path, keys["ours"].private, version="1.2.0", seed=2)
    with pytest.raises(VersionExists, match="was made with another key"):
        push(place, tmp_path, leaf, version="1.2.0", seed=2)


@contextlib.contextmanager
def _no_file_larger_than(size: int) -> Iterator[None]:
    """The system's own error for a file that grows too large; a full disk differs in the number of the error only."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


def test_a_full_disk_is_not_the_fault_of_key_or_signature(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    place = FolderPlace(tmp_path / "registry")
    done = push(place, tmp_path, keys["ours"].private)
    manifest = replace(done.manifest, lineage={}).to_bytes()
    signature = sign_manifest(NAME, manifest, SigningKey(keys["ours"].private))
    trusted, sizes = Keys.read(keys["ours"].public), (100, len(manifest) + 1)
    assert trusted is not None
    # Of the first size not even the manifest can be written, of the second its signature can't.
    assert len(signature) > sizes[1]
    for size in sizes:
        with _no_file_larger_than(size), pytest.raises(MachineError, match="Temporary files cannot be written"):
            sign_manifest(NAME, manifest, SigningKey(keys["ours"].private))
        with _no_file_larger_than(size), pytest.raises(MachineError, match="File too large"):
            verify_signature(NAME, manifest, signature, trusted)
    verify_signature(NAME, manifest, signature, trusted)


def test_without_the_extra_it_is_named(
    tmp_path: Path, keys: dict[str, KeyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FolderPlace(tmp_path / "registry")
    done = push(place, tmp_path, keys["ours"].private)
    trusted, signature = Keys.read(keys["ours"].public), signature_of(place)
    assert trusted is not None
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.setitem(sys.modules, name, None)
    for action in (
        lambda: push(place, tmp_path, keys["ours"].private, version="1.1.0", seed=1),
        lambda: push(place, tmp_path, SigningKey(keys["leaf"].private, keys["leaf"].certificate), version="1.2.0"),
        lambda: pull(place, keys["ours"].public),
        lambda: verify_signature(NAME, done.manifest.to_bytes(), signature, trusted),
    ):
        with pytest.raises(SigningNotInstalled, match=r"pip install 'lora-plugins\[signing\]'"):
            action()
    assert list(place.hub.refs(NAME).tags) == ["v1.0.0"]


def test_an_unsigned_version_after_a_signed_one_keeps_no_signature(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    push(place, tmp_path, keys["ours"].private)
    done = push_adapter(adapter(tmp_path, 1), NAME, version="1.1.0", hub=place.hub)
    assert SIGNATURE_FILE not in place.hub.files(NAME, done.commit)
    assert done.changes.deleted == (SIGNATURE_FILE,)
    push(place, tmp_path, keys["ours"].private, version="1.2.0", seed=2)
    assert pull(place, keys["ours"].public).version == "1.2.0"


def test_locking_requires_the_signature_too(place: Place, tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    push(place, tmp_path, keys["ours"].private)
    with pytest.raises(UnknownSigner):
        lock_adapters([NAME], hub=place.hub, require_signature=keys["theirs"].public)
    assert not Path("adapters.lock").exists()
    assert list(lock_adapters([NAME], hub=place.hub, require_signature=keys["ours"].public)) == [NAME]


PATHS: dict[str, Callable[[Place, Path], object]] = {
    "pull": lambda place, folder: pull_adapter(NAME, hub=place.hub),
    "pull offline": lambda place, folder: pull_adapter(NAME, hub=place.hub, offline=True),
    "lock": lambda place, folder: lock_adapters([NAME], hub=place.hub),
    "pull what is locked": lambda place, folder: lock_adapters(hub=place.hub, lock=folder / "a.lock"),
    "mirror": lambda place, folder: mirror(NAME, FolderPlace(folder / "copy").hub, hub=place.hub),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_setting_requires_signatures_wherever_a_release_is_taken(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(place, tmp_path, keys["ours"].private)
    lock_adapters([NAME], hub=place.hub, lock=tmp_path / "a.lock")
    pull(place, keys["ours"].public)
    monkeypatch.setenv(SIGNATURE_VARIABLE, str(keys["theirs"].public))
    with pytest.raises(UnknownSigner, match="was made with another key"):
        PATHS[case](place, tmp_path)
    assert not (tmp_path / "copy").exists()
    assert not Path("adapters.lock").exists()
    assert not verify(NAME, hub=place.hub).ok
    monkeypatch.setenv(SIGNATURE_VARIABLE, f"{keys['theirs'].public}{os.pathsep}{keys['ours'].public}")
    PATHS[case](place, tmp_path)
    assert verify(NAME, hub=place.hub).ok
    # What a call says stands before the setting.
    with pytest.raises(UnknownSigner):
        pull(place, keys["theirs"].public)
    monkeypatch.setenv(SIGNATURE_VARIABLE, "")
    PATHS[case](place, tmp_path)


def test_a_setting_without_a_key_is_an_error_and_never_no_rule(
    tmp_path: Path, keys: dict[str, KeyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FolderPlace(tmp_path / "registry")
    push(place, tmp_path, keys["ours"].private)
    for setting in (os.pathsep, str(tmp_path / "missing.pub"), str(keys["ours"].private), " "):
        monkeypatch.setenv(SIGNATURE_VARIABLE, setting)
        for action in (pull_adapter, verify):
            with pytest.raises(InvalidKey, match=f"^{SIGNATURE_VARIABLE}: "):
                action(NAME, hub=place.hub)


def test_a_change_request_has_the_signature_and_becomes_the_release(
    loopback_hub: LoopbackHub, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    place, folder = LoopbackPlace(loopback_hub, timeout=30), adapter(tmp_path)
    proposed = push_adapter(folder, NAME, version="1.0.0", hub=place.hub, create_pr=True, sign=keys["ours"].private)
    assert proposed.url
    repo = loopback_hub.repo(NAME)
    [(_, offered)] = repo.pull_requests.items()
    verify_signature(
        NAME, proposed.manifest.to_bytes(), place.hub.read(NAME, offered, SIGNATURE_FILE, 10**6),
        Keys.read(keys["ours"].public) or Keys(()),
    )  # fmt: skip
    assert place.hub.refs(NAME).tags == {}
    repo.branches["main"] = offered  # the owner accepts it
    done = push(place, tmp_path, keys["ours"].private)
    assert done.commit == offered
    assert pull(place, keys["ours"].public).commit == offered
    assert pull(place, keys["ours"].public).manifest.digest == proposed.manifest.digest


def test_a_change_request_after_a_release_replaces_its_signature(
    loopback_hub: LoopbackHub, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    place = LoopbackPlace(loopback_hub, timeout=30)
    push(place, tmp_path, keys["ours"].private)
    push_adapter(adapter(tmp_path, 1), NAME, version="1.1.0", hub=place.hub, create_pr=True, sign=keys["ours"].private)
    repo = loopback_hub.repo(NAME)
    [repo.branches["main"]] = repo.pull_requests.values()
    assert push(place, tmp_path, keys["ours"].private, version="1.1.0", seed=1).version == "1.1.0"
    assert pull(place, keys["ours"].public).version == "1.1.0"


@pytest.mark.parametrize("signed", [True, False])
def test_a_restored_main_has_the_signature_of_its_release_and_no_other(
    place: Place, tmp_path: Path, keys: dict[str, KeyPair], signed: bool
) -> None:
    first = push(place, tmp_path, keys["ours"].private if not signed else None, version="0.9.0")
    newest = push(place, tmp_path, keys["ours"].private if signed else None, version="1.0.0", seed=1)
    # A hub that does not compare parents lets the older push write last.
    files = {path: place.hub.read(NAME, first.commit, path, 10**7) for path in place.hub.files(NAME, first.commit)}
    delete = (SIGNATURE_FILE,) if signed else ()
    old = place.hub.commit(NAME, "main", dict(files), parent=newest.commit, message="late", delete=delete)
    assert place.hub.read(NAME, old, MANIFEST_FILE, 10**6) == first.manifest.to_bytes()
    push(place, tmp_path, keys["ours"].private, version="1.1.0rc1", seed=2)
    main = place.hub.refs(NAME).branches["main"]
    assert main != old
    assert place.hub.read(NAME, main, MANIFEST_FILE, 10**6) == newest.manifest.to_bytes()
    if signed:
        assert place.hub.read(NAME, main, SIGNATURE_FILE, 10**6) == signature_of(place)
    else:
        assert SIGNATURE_FILE not in place.hub.files(NAME, main)


def test_openssf_command_verifies_what_we_sign(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    """Who doesn't trust this package can use theirs: the layout of what is signed is in the docs."""
    place = FolderPlace(tmp_path / "registry")
    done = push(place, tmp_path, keys["ours"].private)
    folder = tmp_path / "release" / NAME
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_bytes(done.manifest.to_bytes())
    (tmp_path / "signature").write_bytes(signature_of(place))
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", str(tmp_path / "signature"),
               "--public_key", str(keys["ours"].public), str(tmp_path / "release")]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_commands_sign_and_require(tmp_path: Path, keys: dict[str, KeyPair]) -> None:
    from typer.testing import CliRunner

    from registry.commands import fetching, publishing

    registry = f"file://{tmp_path / 'registry'}"

    def run(function: Callable[..., None], *arguments: object) -> Any:
        import typer

        app = typer.Typer()
        app.command()(function)
        return CliRunner().invoke(app, [str(each) for each in arguments])

    folder = adapter(tmp_path)
    done = run(publishing.push, folder, NAME, "--version", "1.0.0", "--hub", registry, "--sign", keys["ours"].private)
    assert done.exit_code == 0, done.output
    pulled = run(fetching.pull, NAME, "--hub", registry, "--require-signature", keys["ours"].public)
    assert pulled.exit_code == 0, pulled.output
    for command in (fetching.pull, fetching.verify, fetching.lock):
        assert run(command, NAME, "--hub", registry, "--require-signature", keys["theirs"].public).exit_code == 1
    alone = run(publishing.push, folder, NAME, "--hub", registry, "--certificate", keys["leaf"].certificate)
    assert alone.exit_code == 2
