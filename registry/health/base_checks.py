"""Checks of an adapter against a base model."""

from __future__ import annotations

from collections.abc import Iterator

from registry.base.contract import check_contract
from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import Changes, Check, Finding
from registry.errors import BaseMismatch, RegistryError

__all__ = ["CHECKS"]


def _find_mismatch(files: AdapterFiles) -> Iterator[Finding]:
    """Run the contract: it finds what does not fit, or whole embeddings that repeat the base's own."""
    try:
        result = check_contract(files.folder, files.base)
    except BaseMismatch as error:
        yield _describe(files, error)
        return
    except RegistryError as error:
        yield Finding(str(error))
        return
    if result.copies:
        yield Finding(
            f"{len(result.copies)} tensors, first {result.copies[0]}, repeat an embedding or a head of the base: they "
            "were saved by accident",
            "Leave them out; save with save_embedding_layers=False",
            Changes(drop=result.copies),
            severity="warning",
        )


def _describe(files: AdapterFiles, error: BaseMismatch) -> Finding:
    if error.rename is None:
        return Finding(str(error))
    old, new = error.rename
    renames = {name: new + name.removeprefix(old) for name in files.header.tensors if name.startswith(old)}
    return Finding(str(error), f"Rename {old!r} to {new!r} at the beginning of the names", Changes(renames))


CHECKS = (
    Check(
        "base",
        "error",
        ("base", "configuration", "header"),
        _find_mismatch,
        "Give the base that it was trained on",
    ),
)
