"""Get the files of an adapter that is to be examined, unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from registry.catalog.index import Manifests, index_of
from registry.catalog.state import read_state
from registry.checks.adapter_files import AdapterFiles
from registry.disk.files import read_small
from registry.disk.machine import temporary_folder
from registry.errors import InvalidReference, VersionNotFound
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST_FILE, max_size
from registry.formats.references import Reference, expand_path, is_path
from registry.formats.strict_json import JsonRefused, parse
from registry.formats.tokenizer_files import TOKENIZER_CONFIG
from registry.formats.weights import read_header
from registry.hubs import open_hub
from registry.hubs.protocol import MAIN, Hub

__all__ = ["SMALL", "open_files", "read_base_config"]

#: Bytes of weights whose values are read without being asked to.
SMALL = 64 * 1024 * 1024
_CONFIG, _MAX_CONFIG = "config.json", 4 * 1024 * 1024
_FEW = (ADAPTER_CONFIG, MANIFEST_FILE, TOKENIZER_CONFIG)


@contextmanager
def open_files(
    source: Any, *, hub: Any = None, token: str | bool | None = None, values: bool | None = None, whole: bool = False
) -> Iterator[tuple[AdapterFiles, bool]]:
    """Yield the files of an adapter, and whether to read their values.

    Args:
        source: A folder, or a reference to an adapter on a hub. A string is a folder if one of that name exists, unless
            ``hub`` is given.
        hub: The registry of a reference.
        token: Token for the registry.
        values: Whether to read the values; by default, if the weights have at most 64 MB.
        whole: Whether the weights are needed even if no values are read.

    Raises:
        InvalidReference: It is neither a folder nor a reference.
        VersionNotFound: There is no such release, nor an adapter on the branch ``main``.
        HubError: The hub cannot be asked.
    """
    if hub is None and (not isinstance(source, str) or expand_path(source).is_dir()):
        folder = expand_path(source)
        weights = folder / ADAPTER_WEIGHTS
        small = weights.is_file() and weights.stat().st_size <= SMALL
        here = AdapterFiles(folder, f"The adapter in {folder}", given={"empty": True})
        yield here, small if values is None else values
        return
    place, reference = open_hub(hub, token), _parse(source)
    commit = _find_commit(place, reference)
    files = place.files(reference.name, commit)
    wanted = files.get(ADAPTER_WEIGHTS, 0) <= SMALL if values is None else values
    with temporary_folder() as folder:
        _download(place, reference.name, commit, files, folder, weights=wanted or whole)
        names = tuple(sorted(path for path in files if "/" not in path))
        given: dict[str, Any] = {"empty": True, "names": names}
        if ADAPTER_WEIGHTS in files and not (wanted or whole):
            given["header"] = _read_header(place, reference.name, commit, files[ADAPTER_WEIGHTS])
        yield AdapterFiles(folder, f"The adapter {reference}", given=given), wanted


def read_base_config(base: Any) -> Mapping[str, Any] | None:
    """Return the configuration of a base that is a model, a configuration or a folder; ``None`` for others."""
    config = getattr(base, "config", base)
    if hasattr(config, "to_dict"):
        found: Mapping[str, Any] = config.to_dict()
        return found
    if not is_path(base):
        return None
    try:
        values = parse(read_small(expand_path(base) / _CONFIG, _MAX_CONFIG + 1), _MAX_CONFIG)
    except (OSError, JsonRefused):
        return None
    return values if isinstance(values, Mapping) else None


def _parse(source: str) -> Reference:
    try:
        return Reference.parse(source)
    except InvalidReference as error:
        raise InvalidReference(f"There is no folder {source!r}, and as a reference: {error}") from None


def _find_commit(hub: Hub, reference: Reference) -> str:
    """Return the commit of a release; of a repository without releases, the head of ``main``."""
    refs = hub.refs(reference.name)
    index = index_of(reference.name, refs, read_state(hub, reference.name, refs), Manifests(hub, reference.name))
    try:
        return index.resolve(reference).commit
    except VersionNotFound:
        if reference.commit is not None:
            return reference.commit
        if reference == Reference(reference.name) and MAIN in refs.branches:
            return refs.branches[MAIN]
        raise


def _download(hub: Hub, name: str, commit: str, files: Mapping[str, int], folder: Path, *, weights: bool) -> None:
    for path in (*_FEW, ADAPTER_WEIGHTS) if weights else _FEW:
        if path in files:
            with open(folder / path, "xb") as sink:
                hub.download(name, commit, path, sink, max_size(path))


def _read_header(hub: Hub, name: str, commit: str, size: int) -> Any:
    def read(start: int, length: int) -> bytes:
        return hub.read_range(name, commit, ADAPTER_WEIGHTS, start, length)

    return read_header(read, size, ADAPTER_WEIGHTS, empty=True)
