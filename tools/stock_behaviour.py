"""What huggingface_hub, safetensors and PEFT do with hostile input: the middle column of the threat model's table.

Run it as ``python tools/stock_behaviour.py``; it asks nobody but a Hub on loopback. A row that has changed with a new
release of a library belongs into ``docs/registry-security.md``.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.pop("HF_HUB_OFFLINE", None)

import huggingface_hub
import numpy
import peft
import safetensors
import tiny
import torch
from attacking import raw
from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from releases import draft
from safetensors.numpy import load, save

from registry.testing import LoopbackHub

ROWS: list[tuple[str, Callable[[], str]]] = []


def row(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Add a row to the table."""

    def add(function: Callable[[], str]) -> Callable[[], str]:
        ROWS.append((name, function))
        return function

    return add


@contextmanager
def hub(repository: str = "org/a") -> Iterator[tuple[LoopbackHub, Path]]:
    """A Hub with one release, and a folder for a client."""
    with LoopbackHub() as found, tempfile.TemporaryDirectory() as folder:
        found.create_repo(repository)
        files = {path: bytes(data) for path, data in draft("1.0.0").all_files().items()}  # type: ignore[arg-type]
        found.move_tag(repository, "v1.0.0", found.commit(repository, files))
        yield found, Path(folder)


def fetch(found: LoopbackHub, folder: Path, **options: Any) -> Path:
    """Download a release as people do."""
    arguments = {"revision": "v1.0.0", "endpoint": found.endpoint, "token": found.token, "cache_dir": folder / "cache"}
    return Path(snapshot_download("org/a", **{**arguments, **options}))


@row("1 a listing with ../../x")
def _() -> str:
    with hub() as (found, folder):
        found.faults.hostile_listing(["../../x"])
        fetch(found, folder, local_dir=folder / "local")
        return "accepted"


@row("2 a listing with .git/config, into a folder")
def _() -> str:
    with hub() as (found, folder):
        found.faults.hostile_listing([".git/config", "conftest.py"])
        fetch(found, folder, local_dir=folder / "local")
        written = [path for path in (".git/config", "conftest.py") if (folder / "local" / path).exists()]
        return f"written: {written}"


@row("5 a link in a folder that is uploaded")
def _() -> str:
    with hub() as (found, folder):
        (folder / "secret").write_bytes(b"secret")
        (folder / "up").mkdir()
        (folder / "up" / "notes.txt").symlink_to(folder / "secret")
        (folder / "up" / ".env").write_bytes(b"TOKEN=1")
        HfApi(endpoint=found.endpoint, token=found.token).upload_folder(repo_id="org/a", folder_path=folder / "up")
        sent = [path for path in found.files("org/a") if path in ("notes.txt", ".env")]
        return f"sent: {sent}, the link's target: {found.read('org/a', 'notes.txt') == b'secret'}"


@row("8 adapter_model.bin in place of safetensors")
def _() -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(folder)
        weights = Path(folder, "adapter_model.safetensors")
        tensors = {name: torch.from_numpy(value) for name, value in load(weights.read_bytes()).items()}
        weights.unlink()
        torch.save(tensors, Path(folder, "adapter_model.bin"))
        PeftModel.from_pretrained(tiny.llama(), folder)
        return "loaded, by torch.load"


@row("9 parent_library = os")
def _() -> str:
    return _config(auto_mapping={"base_model_class": "system", "parent_library": "os"})


@row("10 trust_remote_code in a configuration")
def _() -> str:
    return _config(trust_remote_code=True)


@row("11 a key twice in a configuration")
def _() -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "r": 8}')
        return f"accepted, r = {PeftConfig.from_pretrained(folder).r}"


@row("11 target_modules = '.?' * n + '#'")
def _() -> str:
    seconds = []
    for count in (16, 20):
        start = time.perf_counter()
        try:
            get_peft_model(tiny.llama(), LoraConfig(target_modules=".?" * count + "#"))
        except ValueError:
            seconds.append(time.perf_counter() - start)
    return f"{seconds[0]:.2f} s for n = 16, {seconds[1]:.2f} s for n = 20"


def _config(**fields: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(folder)
        path = Path(folder, "adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        PeftModel.from_pretrained(tiny.llama(), folder)
        return "accepted"


@row("12 100,000 empty tensors")
def _() -> str:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    data = raw(b"{" + b",".join(b'"t%d":%b' % (number, entry) for number in range(100_000)) + b"}")
    start = time.perf_counter()
    count = len(load(data))
    return f"accepted, {count:,} in {time.perf_counter() - start:.1f} s"


@row("12 a header of 2^63 bytes")
def _() -> str:
    load(raw(b"{}", length=2**63))
    return "accepted"


@row("13 a tensor's name twice")
def _() -> str:
    one, two = (b'{"dtype":"%b","shape":[1],"data_offsets":[0,4]}' % dtype for dtype in (b"F32", b"I32"))
    found = load(raw(b'{"a":%b,"a":%b}' % (one, two), numpy.array([1], "f4").tobytes()))
    return f"accepted as {found['a'].dtype}: the last one counts"


@row("14 tensors that overlap")
def _() -> str:
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    load(raw(b'{"a":%b,"b":%b}' % (entry, entry), b"\0" * 4))
    return "accepted"


@row("15 NaN")
def _() -> str:
    return f"accepted: {load(save({'a': numpy.array([float('nan')], 'f4')}))['a']}"


@row("16 a norm of the base in an adapter's file")
def _() -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(folder)
        weights = Path(folder, "adapter_model.safetensors")
        tensors = dict(load(weights.read_bytes()))
        tensors["base_model.model.model.norm.weight"] = numpy.full(tiny.llama().config.hidden_size, 7, "f4")
        weights.write_bytes(save(tensors))
        loaded = PeftModel.from_pretrained(tiny.llama(), folder)
        return f"the base's norm is {float(loaded.base_model.model.model.norm.weight[0]):.0f} afterwards, in silence"


@row("18 20 MB of metadata")
def _() -> str:
    load(raw(json.dumps({"__metadata__": {"a": "x" * 20_000_000}}).encode()))
    return "accepted"


@row("19 tampered bytes of the same size")
def _() -> str:
    with hub() as (found, folder):
        found.faults.tamper("*.safetensors")
        path = fetch(found, folder) / "adapter_model.safetensors"
        return f"accepted: {path.read_bytes() != draft('1.0.0').files['adapter_model.safetensors']}"


@row("21 a moved tag")
def _() -> str:
    with hub() as (found, folder):
        before = fetch(found, folder).name
        found.move_tag("org/a", "v1.0.0", found.commit("org/a", {"x": b"1"}))
        return f"another commit in silence: {fetch(found, folder).name != before}"


@row("24 a repository registered anew")
def _() -> str:
    with hub() as (found, folder):
        fetch(found, folder)
        found.delete_repo("org/a")
        found.create_repo("org/a")
        found.move_tag("org/a", "v1.0.0", found.commit("org/a", {"evil": b"1"}))
        return f"accepted: {(fetch(found, folder) / 'evil').exists()}"


@row("25 a folder org/name in the working directory")
def _() -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "org", "name").mkdir(parents=True)
        Path(folder, "org", "name", "adapter_config.json").write_text('{"peft_type": "LORA", "r": 77}')
        before = os.getcwd()
        os.chdir(folder)
        try:
            return f"taken for the repository: r = {PeftConfig.from_pretrained('org/name').r}"
        finally:
            os.chdir(before)


@row("26 a bit flipped in the cache")
def _() -> str:
    with hub() as (found, folder):
        path = (fetch(found, folder) / "adapter_model.safetensors").resolve()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(content)
        return f"handed out: {(fetch(found, folder) / 'adapter_model.safetensors').read_bytes() == bytes(content)}"


@row("34 a hub that answers 503")
def _() -> str:
    with hub() as (found, folder):
        found.faults.status("*", 503, times=None)
        start = time.perf_counter()
        try:
            fetch(found, folder)
        except Exception as error:
            return f"{type(error).__name__} after {time.perf_counter() - start:.0f} s"
        return "accepted"


@row("35 a token in a pickled exception")
def _() -> str:
    with hub() as (found, _):
        try:
            HfApi(endpoint=found.endpoint, token=found.token).model_info("org/nothing")
        except Exception as error:
            held = found.token in str(error.response.request.headers.raw)  # type: ignore[attr-defined]
            try:
                pickled = found.token.encode() in pickle.dumps(error)
            except Exception:
                pickled = False
            return f"in the request of the exception: {held}; in its pickle: {pickled}"
        return "no exception"


@row("38 xet storage at local://")
def _() -> str:
    with hub() as (found, folder):
        constants.HF_HUB_DISABLE_XET = False
        victim = folder / "victim"
        found.faults.xet_cas_url = f"local://{victim}"
        api = HfApi(endpoint=found.endpoint, token=found.token)
        try:
            api.create_commit("org/a", [CommitOperationAdd("b.bin", b"\0" * 1000)], commit_message="m")
        except Exception as error:
            return f"{type(error).__name__}; written at the path that the hub named: {victim.exists()}"
        return f"written at the path that the hub named: {victim.exists()}"


def main() -> int:
    """Print the table."""
    warnings.simplefilter("ignore")
    disable_progress_bars()
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    versions = (huggingface_hub.__version__, safetensors.__version__, peft.__version__)
    print("huggingface_hub {}, safetensors {}, PEFT {}".format(*versions))
    for name, measure in ROWS:
        try:
            found = measure()
        except Exception as error:
            found = f"refused: {type(error).__name__}: {str(error)[:80]!a}"
        print(f"{name}: {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
