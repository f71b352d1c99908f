"""Checks of the files in an adapter's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePath

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import Check, Finding
from registry.errors import InvalidAdapter, UnsafeFile
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.tokenizer_files import MAX_TOKENIZER_CONFIG, TOKENIZER_CONFIG, check_tokenizer_config

__all__ = ["CHECKS", "PRESENCE", "list_rest"]

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
#: Suffixes of files that hold tensors; all but two are pickles.
_TENSORS = frozenset({".bin", ".ckpt", ".npz", ".pkl", ".pt", ".pth", ".safetensors"})
_DATA = (".npz", ".safetensors")
#: Name prefixes of a Trainer's state for resuming, which is not part of the result; FSDP's has the adapter again.
_TO_GO_ON = ("optimizer", "pytorch_model_fsdp", "rng_state", "scaler", "scheduler", "training_args")


def _find_pickle(files: AdapterFiles) -> Iterator[str]:
    pickles = [name for name in _PICKLES if name in files.names]
    if ADAPTER_WEIGHTS not in files.names and pickles:
        yield (
            f"{files.folder / pickles[0]} is a pickle, which runs code where it is read; only {ADAPTER_WEIGHTS} is "
            "published. Load the adapter where you trust it and save it again with save_pretrained."
        )


def _find_absent(files: AdapterFiles) -> Iterator[str]:
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in files.names]
    if missing:
        yield f"{files.folder} has no {' and no '.join(missing)}.{_make_hint(files)}"


def _make_hint(files: AdapterFiles) -> str:
    nested = [name for name in files.names if (files.folder / name / ADAPTER_CONFIG).is_file()]
    if nested:
        return f" It has adapters in {', '.join(nested[:5])}: name one of them."
    return " A PeftModel's save_pretrained writes both."


def _find_rest(files: AdapterFiles) -> Iterator[Finding]:
    """Find files with tensors beside an adapter that are not published with it."""
    names = list_rest(files.names)
    pickles = [name for name in names if PurePath(name).suffix not in _DATA]
    runs = "are pickles, which run" if len(pickles) > 1 else "is a pickle, which runs"
    if names:
        yield Finding(
            f"{files.folder} holds {', '.join(names)}, which a release does not: only what PEFT loads, "
            f"{ADAPTER_WEIGHTS}, is published. If these were trained, the published adapter is not what was trained: "
            "have PEFT save them (modules_to_save, trainable_token_indices), or publish them elsewhere",
            f"{', '.join(pickles)} {runs} code where it is read: delete it, or keep it elsewhere" if pickles else "",
        )


def list_rest(names: Iterable[str]) -> list[str]:
    """Return the files with tensors beside an adapter that are not part of it."""
    return [name for name in names if _is_left_behind(name)]


def _is_left_behind(name: str) -> bool:
    return PurePath(name).suffix in _TENSORS and name != ADAPTER_WEIGHTS and not name.startswith(_TO_GO_ON)


def _find_code(files: AdapterFiles) -> Iterator[str]:
    """Find what makes transformers run code; of a tokenizer's files, only ``tokenizer_config.json`` can."""
    if TOKENIZER_CONFIG in files.names:
        try:
            check_tokenizer_config(files.read(TOKENIZER_CONFIG, MAX_TOKENIZER_CONFIG + 1))
        except UnsafeFile as reason:
            yield str(reason)


#: Whether the folder holds an adapter at all.
PRESENCE = (
    Check("pickled-weights", "error", ("files",), _find_pickle, refused={"folder": UnsafeFile}),
    Check("no-adapter", "error", ("files",), _find_absent, refused={"folder": InvalidAdapter}),
)

CHECKS = (
    *PRESENCE,
    Check("tensors-beside", "warning", ("files",), _find_rest, warned=("folder",)),
    Check("tokenizer-code", "error", ("files",), _find_code, refused={"push": UnsafeFile, "pull": UnsafeFile}),
)
