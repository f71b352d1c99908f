"""Describe code, hardware and libraries of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lora_plugins.plugins.packages import installed_version, installed_versions

__all__ = ["describe_code", "describe_hardware", "describe_libraries", "find_version"]

#: Libraries whose versions can change what a run computes.
_LIBRARIES = (
    "lora-plugins", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors", "tokenizers",
)  # fmt: skip
#: The same, where the run has imported it.
_IMPORTED = "trl"
_SECONDS = 10
#: Settings of a repository may name programs: its file system monitor and its hooks are off.
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-optional-locks")


def describe_libraries(requires: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, CUDA and the libraries that compute.

    Args:
        requires: What the quantization backend of the base needs, as ``Quantizer.requires`` has it.
    """
    names = [*_LIBRARIES, *([_IMPORTED] if _IMPORTED in sys.modules else []), *installed_versions(requires)]
    return {name: version for name in ("python", *names, "cuda") if (version := find_version(name)) is not None}


def find_version(name: str) -> str | None:
    """Return the version of a distribution, of ``python`` or of torch's ``cuda``; ``None`` without one."""
    if name == "python":
        return platform.python_version()
    return torch.version.cuda if name == "cuda" else installed_version(name)


def describe_hardware(args: TrainingArguments) -> dict[str, Any]:
    """Return what the run computes on: device, processor and its instructions, threads, processes."""
    device = args.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found: dict[str, Any] = {"device": named, "processes": args.world_size}
    if device.type != "cpu":
        found["devices"] = max(1, int(getattr(args, "n_gpu", 1)))
    processor = _find_processor()
    found |= {"processor": processor} if processor else {}
    capability: Any = torch.backends.cpu
    found |= {"instructions": capability.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {**found, "system": f"{platform.system()} {platform.machine()}"}


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def describe_code(file: Path | None, of: str) -> dict[str, Any] | str:
    """Return the git commit of a file's repository, and whether it has changes that are not committed.

    Args:
        file: The file; ``None`` takes the script that Python was started with.
        of: What the file is, in words.

    Returns:
        The facts, or the reason why there are none.
    """
    script = file or _find_script()
    if script is None:
        return "Python was started without a script, as in a notebook"
    if _run_git(script.parent, "ls-files", "--error-unmatch", script.name) is None:
        return f"the file of {of} is not in a git repository here"
    commit = _run_git(script.parent, "rev-parse", "HEAD")
    changes = _run_git(script.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return "git does not answer"
    return {"of": of, "commit": commit, "dirty": bool(changes)}


def _find_script() -> Path | None:
    name = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(name).resolve() if name else None


def _run_git(folder: Path, *words: str) -> str | None:
    """Return what git prints, ``None`` if it fails or is missing."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603
            [*_GIT, "-C", str(folder), *words], capture_output=True, timeout=_SECONDS, env=environment, check=False,
            encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
