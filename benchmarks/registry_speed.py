"""What the registry costs: pulling with a cold and a warm cache, beside the stock client's download; many versions.

The Hub is one on loopback, in a process of its own, so nothing but the software is measured. Each figure is the best of
several runs, in which the candidates take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPEATS = 7
NAME = "org/adapter"
BASE = "org/base@" + "b" * 40
#: Modules and ranks of the adapters, of 1, 21 and 210 MB, and of 210 MB in very many tensors.
SIZES = ((16, 8), (80, 32), (200, 128), (3200, 8))
VERSIONS = 10_000


@contextlib.contextmanager
def loopback() -> Iterator[tuple[str, str]]:
    """Endpoint and token of a Hub in another process."""
    command = [sys.executable, "-m", "registry.testing.loopback", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own interpreter and arguments
        assert process.stdout is not None
        lines = [process.stdout.readline().strip().partition("=")[2] for _ in range(2)]
        yield lines[0], lines[1]
        assert process.stdin is not None
        process.stdin.close()


def adapter(folder: Path, modules: int, rank: int) -> Path:
    """An adapter folder of this size."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(modules)
    tensors = {}
    for number in range(modules):
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 1024)
        tensors[f"{name}.lora_B.weight"] = torch.randn(1024, rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(folder))
    return folder


def best(*calls: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """The best time of each, in seconds, taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for number, call in enumerate(calls):
            start = clock()
            call()
            times[number].append(clock() - start)
    return [min(each) for each in times]


def hashed(folder: str) -> None:
    """What a pull has to do in any case: hash every file."""
    for path in Path(folder).iterdir():
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(1024 * 1024):
                digest.update(chunk)


def pulling(endpoint: str, token: str, modules: int, rank: int) -> None:
    """Print the times for one adapter, from a hub and from a folder."""
    from huggingface_hub import snapshot_download

    from registry import mirror, pull_adapter, push_adapter

    with tempfile.TemporaryDirectory() as name:
        root, repository = Path(name), f"{NAME}-{modules}-{rank}"
        source = adapter(root / "adapter", modules, rank)
        done = push_adapter(source, repository, version="1.0.0", hub=endpoint, token=token, base_model=BASE)
        files, fresh = [*done.manifest.files, "adapter_manifest.json"], iter(range(10**6))
        size = sum(record.size for record in done.manifest.files.values())

        def cold() -> None:
            pull_adapter(
                f"{repository}@1.0.0", hub=endpoint, token=token, lock=False, cache_dir=root / str(next(fresh))
            )

        def stock() -> None:
            options = {"endpoint": endpoint, "token": token, "cache_dir": root / str(next(fresh))}
            snapshot_download(repository, revision="v1.0.0", allow_patterns=files, **options)

        print(f"\nadapter of {size / 1e6:.1f} MB, {2 * modules:,} tensors, {len(files)} files")
        # By the clock, and in processor time of this process, which what else a busy machine does is not part of.
        for title, clock in (("", time.perf_counter), (" of the processor's time", time.process_time)):
            ours, theirs = best(cold, stock, clock=clock)
            print(f"  cold pull, verified      {ours * 1000:8.1f} ms{title}")
            print(f"  snapshot_download        {theirs * 1000:8.1f} ms{title}   ratio {ours / theirs:.2f}")
        mirror(repository, root / "registry", hub=endpoint, token=token, cache_dir=root / "passing")
        for title, hub, given in (("hub", endpoint, token), ("folder", root / "registry", None)):

            def warm(hub: Any = hub, given: str | None = given, cache: Path = root / f"warm-{title}") -> str:
                return pull_adapter(f"{repository}@1.0.0", hub=hub, token=given, lock=False, cache_dir=cache).path

            folder = warm()
            pulled, hashing = best(warm, lambda folder=folder: hashed(folder))
            beside = (pulled - hashing) * 1000
            # What a busy machine does meanwhile is not in the processor time.
            spent, spent_hashing = best(warm, lambda folder=folder: hashed(folder), clock=time.process_time)
            work = (spent - spent_hashing) * 1000
            print(
                f"  warm pull from a {title:7} {pulled * 1000:8.1f} ms   besides hashing {beside:.1f} ms, "
                f"of the processor's time {work:.1f} ms"
            )


def many_versions(hub: Any, title: str) -> None:
    """Print how long it takes to choose among many versions."""
    from registry.catalog.index import read_index
    from registry.formats.references import Reference

    references = [Reference.parse(NAME), Reference.parse(f"{NAME}>=1.2,<2")]
    (seconds,) = best(lambda: [read_index(hub, NAME).resolve(reference) for reference in references[:1]])
    (ranged,) = best(lambda: [read_index(hub, NAME).resolve(reference) for reference in references[1:]])
    print(f"  {title:8}  newest {seconds * 1000:8.1f} ms   in a range {ranged * 1000:8.1f} ms")


def versions() -> None:
    """Time the choice among ten thousand version tags below the newest release, on a folder and on a hub."""
    from registry import FolderHub, HuggingFaceHub, push_adapter
    from registry.disk import files as folder_files
    from registry.testing import LoopbackHub

    print(f"\n{VERSIONS:,} versions, refs read anew each time")
    with tempfile.TemporaryDirectory() as name:
        source = adapter(Path(name, "adapter"), 1, 8)
        folder, newest = FolderHub(Path(name, "registry")), f"1.{VERSIONS}.0"
        head = push_adapter(source, NAME, version=newest, hub=folder, base_model=BASE).commit
        tags = ", ".join(f'"v1.{number}.0": "{head}"' for number in range(VERSIONS + 1))
        refs = f'{{"format": 1, "branches": {{"main": "{head}"}}, "tags": {{{tags}}}}}'
        folder_files.replace_file(Path(name, "registry", NAME, "refs.json"), refs.encode())
        many_versions(folder, "folder")
        with LoopbackHub() as loopback_hub:
            hub = HuggingFaceHub(loopback_hub.endpoint, loopback_hub.token)
            commit = push_adapter(source, NAME, version=newest, hub=hub, base_model=BASE).commit
            loopback_hub.repo(NAME).tags.update({f"v1.{number}.0": commit for number in range(VERSIONS)})
            many_versions(hub, "hub")


def main(sizes: int) -> None:
    """Print all figures, or those of the smallest adapters only."""
    os.environ.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    with loopback() as (endpoint, token):
        for modules, rank in SIZES[:sizes]:
            pulling(endpoint, token, modules, rank)
    if sizes >= len(SIZES):
        versions()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many adapters, the smallest first")
    main(parser.parse_args().sizes)
