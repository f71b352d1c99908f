"""Find the newest complete checkpoint, and what is wrong with others."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import safe_globals

from lora_plugins.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from lora_plugins.recipe.files import check_regular, read_json
from lora_plugins.text import one_line

__all__ = ["Checkpoints", "checkpoint_defect", "checkpoint_folders", "find_checkpoints", "finished_state"]


_NAME = re.compile(r"checkpoint-(\d+)")

#: The Trainer (transformers 5.23) writes this file last.
_STATE = "trainer_state.json"


@dataclass
class Checkpoints:
    """The checkpoints in an output folder.

    Attributes:
        newest: The newest complete one, ``None`` when there is none.
        broken: Newer ones that cannot be resumed from, with the reason.
    """

    newest: Path | None = None
    broken: dict[Path, str] = field(default_factory=dict)


def find_checkpoints(output: Path, processes: int = 1) -> Checkpoints:
    """Look for the newest complete checkpoint.

    The Trainer writes checkpoints in place, so one whose writing was cut off looks like any other until its files
    are read.

    Args:
        output: The Trainer's output folder; it may be missing.
        processes: Processes of the run that wants to resume; each has a random state of its own.
    """
    found = Checkpoints()
    for folder in checkpoint_folders(output):
        reason = checkpoint_defect(folder, processes)
        if reason is None:
            found.newest = folder
            break
        found.broken[folder] = reason
    return found


def checkpoint_defect(folder: Path, processes: int = 1) -> str | None:
    """Return why a checkpoint cannot be resumed from, ``None`` for a complete one."""
    return next(_find_defects(folder, processes), None)


def checkpoint_folders(output: Path) -> list[Path]:
    """Return the folders of checkpoints, newest step first."""
    steps = {path: _NAME.fullmatch(path.name) for path in output.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in steps.items() if match), key=_read_step, reverse=True)


def finished_state(checkpoint: Path) -> TrainerState | None:
    """Return the Trainer's state in the checkpoint of a finished run, ``None`` if steps are left."""
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    return state if state.global_step >= state.max_steps else None


def _read_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _find_defects(folder: Path, processes: int) -> Iterator[str]:
    """Yield what is wrong with a checkpoint, cheapest test first."""
    try:
        for name in (_STATE, ADAPTER_CONFIG):
            content = read_json(folder / name, ValueError)
            if name == _STATE and content["global_step"] != _read_step(folder):
                yield f"{_STATE} is of step {content['global_step']}"
        TrainerState.load_from_json(str(folder / _STATE))
    except Exception as error:
        # A state with other fields may raise anything.
        yield f"{type(error).__name__}: {one_line(error)}"
        return
    yield from _find_tensor_defects(folder / ADAPTER_FILE)
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *random):
        yield from _find_archive_defects(folder / name)


def _find_tensor_defects(file: Path) -> Iterator[str]:
    try:
        check_regular(file)
        # Opening compares the file's length with its header.
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        yield f"{file.name}: {error}"


def _find_archive_defects(file: Path) -> Iterator[str]:
    """Yield what is wrong with a file of ``torch.save``: a zip archive, whose checksums detect truncation."""
    try:
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            # torch.save compresses nothing; a compressed member could expand to any size.
            odd = [info.filename for info in archive.infolist() if info.compress_type or info.flag_bits & 1]
            member = None if odd else archive.testzip()
        if odd or member is not None:
            yield f"{file.name}: {member or odd[0]} is damaged, or not written by torch.save"
            return
        with safe_globals():
            # Reads the structure; the tensors stay in the file. Pickled code is rejected, as by the Trainer.
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # zipfile and the unpickler raise errors of many kinds for damaged files.
        yield f"{file.name}: {one_line(error)[:300] or type(error).__name__}"
