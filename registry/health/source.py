"""Get the files of an adapter that is to be examined, unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from registry.catalog.index import Index, Release, read_index
from registry.catalog.plain import PlainAdapter
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
        VersionNotFound: There is no such release, branch or folder.
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
    release = _find_release(read_index(place, reference.name), reference)
    found = _list_files(place, release)
    wanted = found.files.get(ADAPTER_WEIGHTS, 0) <= SMALL if values is None else values
    with temporary_folder() as folder:
        _download(place, found, folder, weights=wanted or whole)
        given: dict[str, Any] = {"empty": True, "names": tuple(sorted(found.files))}
        if ADAPTER_WEIGHTS in found.files and not (wanted or whole):
            given["header"] = _read_header(place, found)
        yield AdapterFiles(folder, f"The adapter {release}", given=given), wanted


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
        raise InvalidReference(f"The folder {source!r} does not exist, and as a reference: {error}") from None


def _find_release(index: Index, reference: Reference) -> Release:
    """Return a release, or the commit and the folder of an adapter that nobody published.

    Without a release, a bare name is what the head of ``main`` holds. A commit that is refused as an adapter is
    examined all the same, unless its adapters are in other folders.

    Raises:
        VersionNotFound: There is no such release, branch or folder; the message says which adapters there are.
    """
    try:
        return index.resolve(reference, unversioned=True)
    except VersionNotFound:
        named = MAIN if reference.bare else reference.branch or reference.alias
        commit = reference.commit or index.branches.get(named or "")
        there = index.manifests.list_plain(commit) if index.manifests is not None and commit is not None else None
        if commit is None or there is None or (there and all(each.folder != reference.folder for each in there)):
            raise
        return Release.at_commit(reference.name, commit, reference.folder)


def _list_files(hub: Hub, release: Release) -> PlainAdapter:
    """Return the files in the folder of an adapter."""
    inner = f"{release.folder}/" if release.folder else ""
    paths = hub.files(release.name, release.commit)
    files = {path.removeprefix(inner): size for path, size in paths.items() if path.startswith(inner)}
    files = {name: size for name, size in files.items() if "/" not in name}
    return PlainAdapter(release.name, release.commit, release.folder, files)


def _download(hub: Hub, adapter: PlainAdapter, folder: Path, *, weights: bool) -> None:
    for name in (*_FEW, ADAPTER_WEIGHTS) if weights else _FEW:
        if name in adapter.files:
            with open(folder / name, "xb") as sink:
                hub.download(adapter.name, adapter.commit, adapter.path(name), sink, max_size(name))


def _read_header(hub: Hub, adapter: PlainAdapter) -> Any:
    def read(start: int, length: int) -> bytes:
        return hub.read_range(adapter.name, adapter.commit, adapter.path(ADAPTER_WEIGHTS), start, length)

    return read_header(read, adapter.files[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS, empty=True)
