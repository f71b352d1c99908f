"""Attacks 1 to 18: names, links, code, configurations and weights, each planted on either registry."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from attacking import CONFIG, MANIFEST, WEIGHTS, A, Attack, Attempt, Scene, config, harmless, raw, refused, values
from hubs import FolderPlace
from packaging.version import Version
from releases import MODULE, draft, folder_of, release

from registry import set_alias, versions
from registry.errors import (
    AdapterWarning,
    BaseMismatch,
    HostileAnswer,
    IntegrityError,
    InvalidAdapter,
    InvalidManifest,
    InvalidReference,
    PublishError,
    RepositoryNotFound,
    TooLarge,
    UnsafeFile,
    VersionNotFound,
)
from registry.upkeep.mirroring import mirror

_PATHS = (
    "../../x", "/abs", "C:\\x", "\\\\srv\\x", "..\\x", "a/../../x", "", ".", "x\0", "x\n", "x" * 5000, "x.", "x ",
    "CON",
    "caf\u00e9.json",
    "cafe\u0301.json", "readme.md", "README.md/x", "sub/README.md",
)  # fmt: skip
_CODE = (
    ".git/config", ".git/hooks/post-checkout", ".cache/huggingface/token", ".env", "conftest.py", "x.pth",
    "sitecustomize.py", "modeling_evil.py", "adapter_model.bin", "adapter_model.pt", "adapter_model.pkl",
)  # fmt: skip
_ENTRY = {"size": 1, "sha256": "0" * 64}


def _names(scene: Scene, paths: tuple[str, ...]) -> Iterator[Attempt]:
    for path in paths:
        name = scene.publish(manifest=lambda document, path=path: document["files"].update({path: _ENTRY}))
        yield refused(f"listed in the manifest: {path[:20]!r}", lambda name=name: scene.pull(name))
    name = scene.publish()
    there = [path for path in paths if path and path.isprintable() and len(path) < 200]
    if scene.kind == "folder":
        there = [path for path in there if not set("\\/") & set(path) and path != "."]
    scene.place.plant(name, scene.commit_of(name), dict.fromkeys(there, b"harm"))
    yield harmless("listed by the hub", lambda: _is_whole(scene, name))


def _is_whole(scene: Scene, reference: str, seed: int = 0, version: str = "1.0.0") -> None:
    """A pull gives the files of the release and none besides."""
    before = {path for path in scene.folder.rglob("*") if scene.cache not in path.parents and path != scene.cache}
    adapter = scene.pull(reference)
    found = folder_of(Path(adapter.path))
    assert set(found) == {*draft(version).files, MANIFEST}
    assert found[WEIGHTS] == draft(version, seed).files[WEIGHTS]
    after = {path for path in scene.folder.rglob("*") if scene.cache not in path.parents and path != scene.cache}
    assert after == before


def _paths(scene: Scene) -> Iterator[Attempt]:
    yield from _names(scene, _PATHS)


def _code_names(scene: Scene) -> Iterator[Attempt]:
    yield from _names(scene, _CODE)
    folder = scene.adapter()
    for path in ("conftest.py", ".env", "sitecustomize.py"):
        (folder / path).write_bytes(b"raise SystemExit")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    yield refused("pushed", lambda: scene.push(folder))


def _references(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish(seed=1)
    for reference in (
        "../x", "org/..", "org/%2e%2e", "org/a/b/../c", "org/a b", "org/a#b", "org/\u0430",
        "CON/x", "org/a\0", f"{name}@@1",
        f"{name}@v1..0", f"{name}@abcdef1", f"{name}@refs/heads/main\n", f"{name}@1.2.3+build", 
        f"{name}@{'1' + '0' * 400}",
        f"{name}@01.2.3", f"{name}@1%2e0", f"{name}@1.0.0 ; rm",
    ):  # fmt: skip
        yield refused(f"pull {reference[:30]!r}", lambda reference=reference: scene.pull(reference))
    folder = scene.adapter()
    for version in ("01.2.3", "1.2.3+build", "1" + "0" * 400, "9" * 62, "0" * 40, "", "latest\n", "1.2/../3"):
        yield refused(f"push {version[:20]!r}", lambda version=version: scene.push(folder, version=version))
    for alias in ("v1.0.0", "1.0", "abcdef1", "main", "../x", "a b", "a@b", "latest"):
        yield refused(f"alias {alias!r}", lambda alias=alias: set_alias(f"{name}@1.0.0", alias, hub=scene.place.hub))
    other = scene.publish(name, version="2.0.0", seed=2)
    scene.place.hub.create_branch(other, "v1.0.0", scene.commit_of(other, "2.0.0"))
    yield harmless("a branch of a tag's name", lambda: _is_whole(scene, f"{name}@1.0.0", seed=1))
    for tag in ("v01.2.3", "v1.2.3+build", f"v{'9' * 62}", f"v{'0' * 40}", "v3.0.0/x"):
        scene.place.move_tag(name, tag, scene.commit_of(name))
    yield harmless("tags that are no versions", lambda: _has(scene, name, ["1.0.0", "2.0.0"]))


def _has(scene: Scene, name: str, expected: list[str]) -> None:
    assert [each.version for each in versions(name, hub=scene.place.hub)] == expected
    assert Version(expected[0])


def _tensor_names(scene: Scene) -> Iterator[Attempt]:
    for tensor in ("../../x", "__class__", "a" * 1_000_000, "a.__init__.b", "a..b", "a/b", "x\0", "\u202ea"):
        weights = values(**{tensor: numpy.ones((2, 2), "f4")})
        name = scene.publish(files={WEIGHTS: weights})
        yield refused(f"pull {tensor[:12]!r}", lambda name=name: scene.pull(name))
        hidden = scene.publish(files={WEIGHTS: weights}, tensors={A: {"dtype": "F32", "shape": [2, 8]}})
        yield refused(f"pull, hidden {tensor[:12]!r}", lambda name=hidden: scene.pull(name))
        yield refused(f"push {tensor[:12]!r}", partial(scene.push, scene.adapter({WEIGHTS: weights})))


def _special_files(scene: Scene) -> Iterator[Attempt]:
    secret = scene.new_folder() / "secret"
    secret.write_bytes(values())
    other = scene.new_folder()

    def plant(kind: str, path: Path) -> None:
        path.unlink()
        if kind == "symbolic link":
            path.symlink_to(secret)
        elif kind == "link to a folder":
            path.symlink_to(other)
        elif kind == "hard link":
            os.link(secret, path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            scene.patch.chdir(path.parent)
            socket.socket(socket.AF_UNIX).bind(path.name)
            scene.patch.chdir(scene.folder / "work")

    for kind in ("symbolic link", "link to a folder", "hard link", "pipe", "device", "socket"):
        for file in (WEIGHTS, CONFIG, "tokenizer.json"):
            folder = scene.adapter({file: values()} if file == "tokenizer.json" else None)
            plant(kind, folder / file)
            yield refused(f"{kind} as {file}", lambda folder=folder: scene.push(folder))


def _planted_links(scene: Scene) -> Iterator[Attempt]:
    victim = scene.new_folder()
    place = scene.place if isinstance(scene.place, FolderPlace) else FolderPlace(scene.folder / "other")
    for where in ("", "commits", "refs.json", "repository.json"):
        name = scene.new_name()
        release(place.hub, "1.0.0", name=name)
        path = place.root / name / where
        path.rename(victim / f"moved-{name.partition('/')[2]}")
        path.symlink_to(victim / f"moved-{name.partition('/')[2]}")
        yield refused(f"pull through {where or 'the repository'}", lambda name=name: scene.pull(name, hub=place.hub))
        yield refused(
            f"push through {where or 'the repository'}", lambda name=name: release(place.hub, "2.0.0", name=name)
        )
    (place.root / "evil").symlink_to(victim)
    yield refused("push through the owner", lambda: release(place.hub, "1.0.0", name="evil/x"))
    source = scene.publish("evil/x") if scene.kind == "loopback" else None
    if source:
        # What is copied was pulled before, and stays in the cache.
        scene.pull(source)
        yield refused("mirror through the owner", lambda: mirror(source, place.hub, hub=scene.place.hub))


def _links_in_the_cache(scene: Scene) -> Iterator[Attempt]:
    name = scene.publish()
    pulled = Path(scene.pull(name).path)
    outside = scene.new_folder() / "outside"
    outside.write_bytes((pulled / WEIGHTS).read_bytes())

    def plant() -> None:
        pulled.chmod(0o755)
        (pulled / WEIGHTS).unlink()
        (pulled / WEIGHTS).symlink_to(outside)

    plant()
    yield refused("offline", lambda: scene.pull(name, offline=True, hub=_far(scene)))

    def again() -> None:
        plant()
        adapter = scene.pull(name)
        assert not (Path(adapter.path) / WEIGHTS).is_symlink()

    if scene.kind == "folder":
        (pulled / WEIGHTS).unlink()
        (pulled / WEIGHTS).write_bytes(outside.read_bytes())
    yield harmless("with a network", again)
    assert outside.exists()


def _far(scene: Scene) -> Any:
    """The registry as one that only a network leads to: what is local is read even offline."""
    if scene.kind == "folder":
        scene.patch.setattr(type(scene.place.hub), "local", False)
    return scene.place.hub


def _zip(content: bytes, before: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", content)
    return before + buffer.getvalue()


def _pickles(scene: Scene) -> Iterator[Attempt]:
    code = pickle.dumps({"a": [1, 2, 3]})
    for label, content in {
        "pickle": code, "zip": _zip(code), "polyglot": _zip(code, values()), 
        "7z": b"7z\xbc\xaf\x27\x1c" + code + b"\0" * 64,
        "pickle of 5 MB": code + b"\0" * 5_000_000, "nothing": b"",
    }.items():  # fmt: skip
        name = scene.publish(files={WEIGHTS: content})
        yield refused(f"pull {label}", lambda name=name: scene.pull(name))
        yield refused(f"push {label}", partial(scene.push, scene.adapter({WEIGHTS: content})))
    for file in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin"):
        folder = scene.adapter()
        (folder / WEIGHTS).rename(folder / file)
        yield refused(f"push {file}", lambda folder=folder: scene.push(folder))
        name = scene.publish(
            files={WEIGHTS: None, file: code}, manifest=lambda document: document["files"].pop(WEIGHTS)
        )
        yield refused(f"pull {file}", lambda name=name: scene.pull(name))


def _configurations(scene: Scene, cases: Mapping[str, bytes]) -> Iterator[Attempt]:
    for label, content in cases.items():
        name = scene.publish(files={CONFIG: content})
        yield refused(f"pull {label}", lambda name=name: scene.pull(name))
        yield refused(f"push {label}", partial(scene.push, scene.adapter({CONFIG: content})))


def _imports(scene: Scene) -> Iterator[Attempt]:
    yield from _configurations(scene, {
        "os": config(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        "transformers_evil": config(auto_mapping={"parent_library": "transformers_evil"}),
        "a submodule": config(auto_mapping={"parent_library": "transformers.models.x;os"}),
        "a text": config(auto_mapping="os"),
        "megatron_core": config(megatron_core="evil"),
        "megatron_config": config(megatron_config={"a": 1}),
    })  # fmt: skip


def _remote_code(scene: Scene) -> Iterator[Attempt]:
    for value in ("evil/remote-code", "/etc", "~", "https://evil.example/x", "../x"):
        name = scene.publish(files={CONFIG: config(base_model_name_or_path=value)})
        yield refused(f"another base in the configuration: {value}", lambda name=name: scene.pull(name))
        name = scene.publish(
            files={CONFIG: config(base_model_name_or_path=value)},
            manifest=lambda document, value=value: document["base"].update(id=value),
        )
        if value != "evil/remote-code":
            yield refused(f"a base that is no id: {value}", lambda name=name: scene.pull(name))
    for key, value in {"trust_remote_code": True, "auto_map": {"AutoModel": "evil.Model"}}.items():
        name = scene.publish(files={CONFIG: config(**{key: value})})
        yield refused(f"pull {key}", lambda name=name: scene.pull(name))
        folder = scene.adapter({CONFIG: config(**{key: value})})
        yield refused(f"push {key}", lambda folder=folder: scene.push(folder))
    mapped = json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}).encode()
    name = scene.publish(files={"tokenizer_config.json": mapped})
    yield refused("pull auto_map in tokenizer_config.json", lambda name=name: scene.pull(name))
    name = scene.publish(files={"tokenizer_config.json": b'{"trust_remote_code": true}'})
    yield refused("pull trust_remote_code in tokenizer_config.json", lambda: scene.pull(name))
    for file in ("tokenization_evil.py", "modeling.py", "chat_template.py"):
        code = scene.publish(files={file: b"import os"})
        yield refused(f"pull {file}", lambda name=code: scene.pull(name))
    template = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
    kept = scene.publish(files={"chat_template.jinja": template})

    def is_text() -> None:
        assert Path(scene.pull(kept).path, "chat_template.jinja").read_bytes() == template

    yield harmless("a template is text", is_text)


def _hostile_configurations(scene: Scene) -> Iterator[Attempt]:
    text = config().decode()
    yield from _configurations(scene, {
        "a key twice": text.replace("{", '{"r": 4, ', 1).encode(),
        "NaN": config(lora_alpha=float("nan")),
        "Infinity": text.replace('"lora_alpha": 4', '"lora_alpha": 1e999').encode(),
        "deep": b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        "large": config(x="y" * 5_000_000),
        "r of -1": config(r=-1),
        "r of 10^9": config(r=10**9),
        "r as text": config(r="2"),
        "r as truth": config(r=True),
        "a long number": text.replace('"r": 2', f'"r": {"9" * 5000}').encode(),
        "an unknown kind": config(peft_type="os.system"),
        "nested repetition": config(target_modules="(a+)+b"),
        "optionals in sequence": config(target_modules="(?:.?){60}#"),
        "optionals written out": config(target_modules=".?" * 60 + "#"),
        "optionals to exclude": config(exclude_modules=".?" * 60 + "#"),
        "a slow rank pattern": config(rank_pattern={"(?:.?){60}#": 2}),
        "a slow alpha pattern": config(alpha_pattern={"(\\w+)*x": 2}),
        "a slow name of a module to save": config(modules_to_save=["(.*)*#"], target_modules="(.*)*#"),
        "replicated layers": config(layer_replication=[[0, 2]] * 200_000),
        "300,000 names": config(target_modules=[f"m{number}" for number in range(300_000)]),
        "lone surrogate": text.replace("org/base", "\\ud800").encode(),
        "no JSON": b"\xff\xfe{",
        "a list": b"[]",
    })  # fmt: skip


def _weights(scene: Scene, cases: Mapping[str, bytes], *, push: bool = True) -> Iterator[Attempt]:
    for label, content in cases.items():
        name = scene.publish(files={WEIGHTS: content})
        yield refused(f"pull {label}", lambda name=name: scene.pull(name))
        if push:
            yield refused(f"push {label}", partial(scene.push, scene.adapter({WEIGHTS: content})))


_T = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
_EIGHT = b"\0" * 8


def _headers(scene: Scene) -> Iterator[Attempt]:
    entry = json.dumps(_EMPTY).encode()
    many = b"{" + b",".join(b'"t%d":%b' % (n, entry) for n in range(100_000)) + b"}"
    yield from _weights(scene, {
        "length 2^63": raw({A: _T}, _EIGHT, length=2**63),
        "length 2^64-1": raw({A: _T}, _EIGHT, length=2**64 - 1),
        "longer than the file": raw({A: _T}, _EIGHT, length=1000),
        "header of 9 MB": raw(b" " * 9_000_000 + b"{}"),
        "100,000 empty tensors": raw(many),
        "no JSON": raw(b"no JSON"),
        "a list": raw([1]),
        "deep": raw(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "seven bytes": b"\0" * 7,
    })  # fmt: skip
    if scene.kind == "folder":
        many = b"{" + b",".join(b'"t%d":%b' % (n, entry) for n in range(1_000_000)) + b"}"
        yield refused("push a million empty tensors", partial(scene.push, scene.adapter({WEIGHTS: raw(many)})))


def _duplicates(scene: Scene) -> Iterator[Attempt]:
    entry = json.dumps(_T).encode()
    yield from _weights(scene, {
        "a name twice": raw(b'{"%b": %b, "%b": %b}' % (A.encode(), entry, A.encode(), entry), _EIGHT),
        "a name twice, once escaped": raw(b'{"abc": %b, "\\u0061bc": %b}' % (entry, entry), _EIGHT),
        "a key twice": raw(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', _EIGHT),
        "metadata twice": raw(b'{"__metadata__": {}, "__metadata__": {"a": "b"}, "a": %b}' % entry, _EIGHT),
    })  # fmt: skip


def _layouts(scene: Scene) -> Iterator[Attempt]:
    yield from _weights(scene, {
        "overlap": raw({"a": _T, "b": _T}, _EIGHT),
        "hole": raw({"a": {**_T, "data_offsets": [4, 12]}}, _EIGHT + b"\0" * 4),
        "hole between": raw({"a": _T, "b": {**_T, "data_offsets": [12, 20]}}, b"\0" * 20),
        "trailing bytes": values() + b"more",
        "missing bytes": values()[:-4],
        "shape that overflows": raw({"a": {**_T, "shape": [2**33, 2**33]}}, _EIGHT),
        "negative shape": raw({"a": {**_T, "shape": [-2]}}, _EIGHT),
        "offsets backwards": raw({"a": {**_T, "data_offsets": [8, 0]}}, _EIGHT),
        "empty tensors at one offset": raw({"b": _EMPTY, "c": _EMPTY, "a": _T}, _EIGHT),
        "a dtype that is none": raw({"a": {**_T, "dtype": "Q4"}}, _EIGHT),
    })  # fmt: skip


def _spoilt(value: float, dtype: str = "f4") -> bytes:
    with numpy.errstate(over="ignore"):
        spoilt = numpy.full((8, 2), value).astype(dtype)
    return values(B=spoilt)


def _numbers(scene: Scene) -> Iterator[Attempt]:
    yield from _weights(scene, {
        "NaN": _spoilt(float("nan")),
        "infinity": _spoilt(float("inf")),
        "-infinity in float16": _spoilt(float("-inf"), "f2"),
        "1e38": _spoilt(1e38),
        "one NaN among many": values(B=numpy.array([[0.1, 0.2]] * 7 + [[0.1, float("nan")]], "f4")),
    })  # fmt: skip
    zero = {"all zero": values(B=numpy.zeros((8, 2), "f4")), "denormal": _spoilt(1e-40)}
    for label, content in zero.items():
        yield refused(f"push {label}", partial(scene.push, scene.adapter({WEIGHTS: content})))
        name = scene.publish(files={WEIGHTS: content})
        yield Attempt(f"pull {label} with warnings as errors", lambda name=name: scene.pull(name), writes=True)


def _shapes(scene: Scene) -> Iterator[Attempt]:
    yield from _weights(scene, {
        "A without B": values(B=None),
        "B without A": values(A=None),
        "rank 4 where the configuration says 2": values(A=numpy.ones((4, 8), "f4"), B=numpy.ones((8, 4), "f4")),
        "two ranks": values(B=numpy.ones((8, 3), "f4")),
        "one dimension": values(A=numpy.ones(16, "f4")),
        "integers": values(A=numpy.ones((2, 8), "i8")),
        "a foreign prefix": values(**{"model.x.lora_A.weight": numpy.ones((2, 8), "f4")}),
        "no LoRA at all": values(A=None, B=None, **{"base_model.model.x.weight": numpy.ones((2, 2), "f4")}),
    })  # fmt: skip
    base = MODULE.rpartition(".self_attn")[0]
    ones = numpy.ones((8,), "f4")
    for label, name in {
        "a norm of the base": f"{base}.input_layernorm.weight",
        "a matrix of the base": f"{base}.self_attn.o_proj.weight",
        "the adapted matrix": f"{base}.self_attn.q_proj.base_layer.weight",
        "the head": "base_model.model.lm_head.weight",
        "a bias": f"{base}.self_attn.q_proj.bias",
    }.items():
        content = values(**{name: ones})
        yield refused(f"push {label}", partial(scene.push, scene.adapter({WEIGHTS: content})))
        planted = scene.publish(files={WEIGHTS: content})
        yield refused(f"pull {label}", lambda name=planted: scene.pull(name))
    double = values(A=numpy.ones((2, 8), "f8"), B=numpy.ones((8, 2), "f8"))
    yield refused("push float64", lambda: scene.push(scene.adapter({WEIGHTS: double})))
    name = scene.publish(files={WEIGHTS: double})
    yield Attempt("pull float64 with warnings as errors", lambda: scene.pull(name), writes=True)


def _sizes(scene: Scene) -> Iterator[Attempt]:
    for size in (10**13, 2**63, 10**400, -1):
        name = scene.publish(manifest=lambda document, size=size: document["files"]["README.md"].update(size=size))
        yield refused(f"declared: {str(size)[:15]} bytes", lambda name=name: scene.pull(name))
    name = scene.publish()
    scene.exchange(name, "1.0.0", {WEIGHTS: values() + b"x" * 3_000_000})
    yield refused("more bytes than declared", lambda: scene.pull(name))
    sparse = scene.adapter()
    with open(sparse / WEIGHTS, "r+b") as file:
        file.truncate(50 * 1024**3)
    yield refused("push a sparse file of 50 GB", lambda: scene.push(sparse))
    if scene.kind == "loopback":
        scene.loopback.faults.clear()
        bomb = gzip.compress(b"x" * 50_000_000)
        packed = scene.publish()
        scene.loopback.faults.answer("resolve_cache", bomb, times=None, Content_Encoding="gzip")
        scene.loopback.faults.answer("storage", bomb, times=None, Content_Encoding="gzip")
        yield refused("a body that unpacks to 50 MB", lambda: scene.pull(packed))
        scene.loopback.faults.clear()
    else:
        packed = scene.publish()
        scene.exchange(packed, "1.0.0", {MANIFEST: b" " * 9_000_000})
        yield refused("a manifest of 9 MB", lambda: scene.pull(packed))


def _metadata(scene: Scene) -> Iterator[Attempt]:
    entry = {A: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    large = raw({"__metadata__": {"a": "x" * 20_000_000}, **entry}, _EIGHT)
    yield refused("push 20 MB", lambda: scene.push(scene.adapter({WEIGHTS: large})))
    yield from _weights(scene, {
        "2 MB": raw({"__metadata__": {"a": "x" * 2_000_000}, **entry}, _EIGHT),
        "numbers": raw({"__metadata__": {"a": 1}, **entry}, _EIGHT),
        "a list": raw({"__metadata__": [1], **entry}, _EIGHT),
    })  # fmt: skip


_CONTENT = (UnsafeFile, InvalidAdapter, InvalidManifest, IntegrityError)
_BROKEN = (*_CONTENT, HostileAnswer, TooLarge, PublishError)

ATTACKS = (
    Attack(1, "hostile paths", (InvalidManifest,), _paths),
    Attack(2, "names that are code or settings", (InvalidManifest, UnsafeFile), _code_names),
    Attack(3, "hostile references", (InvalidReference, VersionNotFound), _references),
    Attack(4, "hostile tensor names", _CONTENT, _tensor_names),
    Attack(5, "links and special files in a pushed folder", (UnsafeFile,), _special_files),
    Attack(6, "links planted in a folder registry", (HostileAnswer, RepositoryNotFound), _planted_links),
    Attack(7, "links planted in the cache", (IntegrityError,), _links_in_the_cache),
    Attack(8, "pickles and polyglots", (UnsafeFile, InvalidManifest), _pickles),
    Attack(9, "libraries named in a configuration", (UnsafeFile,), _imports),
    Attack(10, "bases and code from elsewhere", (*_CONTENT, BaseMismatch, PublishError), _remote_code),
    Attack(11, "hostile configurations", _CONTENT, _hostile_configurations),
    Attack(12, "hostile headers", _BROKEN, _headers),
    Attack(13, "names given twice", _CONTENT, _duplicates),
    Attack(14, "overlaps, holes and overflows", _CONTENT, _layouts),
    Attack(15, "values that no adapter has", (*_CONTENT, AdapterWarning), _numbers),
    Attack(16, "tensors that do not fit", (*_CONTENT, AdapterWarning, BaseMismatch), _shapes),
    Attack(17, "sizes without end", (InvalidManifest, HostileAnswer, TooLarge, UnsafeFile), _sizes),
    Attack(18, "large metadata", _BROKEN, _metadata),
)
