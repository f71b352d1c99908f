"""Load data sets and their splits from files, folders or the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from lora_plugins.errors import DataError
from lora_plugins.recipe.arguments import RecipeArguments, held_out_share
from lora_plugins.recipe.files import check_regular
from lora_plugins.recipe.scanning import check_rows
from lora_plugins.text import one_line
from registry import expand_path, is_path

__all__ = ["LOADERS", "choose_split", "is_local", "load_examples", "load_splits"]


#: File extension -> loader of ``datasets``.
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

#: Word in a file's name -> split.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

_WORD = re.compile("[a-z]+")


def load_examples(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on and those to evaluate on.

    Args:
        recipe: Names the data sets and splits.
        seed: Decides which rows are held out if ``--eval_split`` is a share.

    Raises:
        DataError: A data set is missing, unreadable or empty, or has no such split.
    """
    splits = load_splits(recipe.dataset)
    train = choose_split(splits, recipe.train_split, recipe.dataset, "--train_split")
    if recipe.eval_dataset is not None:
        others = load_splits(recipe.eval_dataset)
        return train, choose_split(others, recipe.eval_split, recipe.eval_dataset, "--eval_split")
    share = held_out_share(recipe)
    if share is None:
        if recipe.eval_split is None:
            return train, None
        return train, choose_split(splits, recipe.eval_split, recipe.dataset, "--eval_split")
    count = round(len(train) * share)
    if not 0 < count < len(train):
        raise DataError(
            f"--eval_split {share} of {len(train)} examples is {count}: nothing is left for one of the two."
        )
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def load_splits(source: str) -> dict[str, Dataset]:
    """Return the splits of a data set by name.

    A file is the split ``"train"``. The files of a folder belong to the splits in their names, or all to ``"train"``
    if no name has one.

    Args:
        source: A file, a folder of files, a folder that ``save_to_disk`` wrote, or a Hub id, with ``@revision`` for one
            of its revisions. Whatever is visibly a path (`registry.is_path`), has a known extension or exists here is
            not looked up on the Hub.

    Raises:
        DataError: It is missing or unreadable.
    """
    return _load_path(expand_path(source)) if is_local(source) else _load_hub(source)


def is_local(source: str) -> bool:
    """Whether a data set is read from this machine and not looked up on the Hub."""
    path = expand_path(source)
    return is_path(source) or path.suffix in LOADERS or path.exists()


def choose_split(splits: dict[str, Dataset], name: str | None, source: str, flag: str) -> Dataset:
    """Return one split of a data set.

    Args:
        splits: The splits.
        name: The one to take; ``None`` takes the only one.
        source: The data set, for messages.
        flag: Flag that chooses the split, for messages.

    Raises:
        DataError: It has no such split or several, or the split is empty.
    """
    known = ", ".join(splits)
    if name is None:
        if len(splits) > 1:
            raise DataError(f"{source} has several splits: {known}. Choose with {flag}.")
        name = next(iter(splits))
    if name not in splits:
        advice = f"Choose with {flag}."
        if flag == "--eval_split" and len(splits) == 1:
            advice = f"Hold out a share of it with {flag} 0.05, or name another data set with --eval_dataset."
        raise DataError(f"{source} has no split {name!r}; it has {known}. {advice}")
    if not len(splits[name]):
        raise DataError(f"The split {name!r} of {source} is empty.")
    return splits[name]


def _load_path(path: Path) -> dict[str, Dataset]:
    if not path.exists():
        raise DataError(f"The data set {path} is not there.")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        found = _read_naming(path, lambda: load_from_disk(str(path)))
        return dict(found) if isinstance(found, dict) else {"train": found}
    files, loader = _find_files(path)
    for file in [one for part in files.values() for one in part]:
        _check_file(file)

    def load() -> Any:
        return load_dataset(loader, data_files={name: [str(file) for file in part] for name, part in files.items()})

    return dict(_read_naming(path, load))


def _check_file(path: Path) -> None:
    _read_naming(path, lambda: check_regular(path))
    check_rows(path)


def _find_files(path: Path) -> tuple[dict[str, list[Path]], str]:
    """Return the files by split, and the loader of ``datasets`` for them."""
    files = [path] if not path.is_dir() else sorted(file for file in path.iterdir() if file.suffix in LOADERS)
    loaders = {LOADERS.get(file.suffix) for file in files}
    known = ", ".join(LOADERS)
    if not files:
        raise DataError(f"The folder {path} has neither {known} files nor what save_to_disk writes.")
    loader = loaders.pop()
    if loader is None:
        raise DataError(f"{path} is none of the files that can be read: {known}.")
    if loaders:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(f"The folder {path} mixes kinds of files ({names}). Name one of them, or use a folder each.")
    return (_sort_by_split(path, files) if path.is_dir() else {"train": files}), loader


def _sort_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group files by the split that their names contain."""
    found: dict[str, list[Path]] = {}
    nameless = []
    for file in files:
        split = next((_SPLIT_WORDS[word] for word in _WORD.findall(file.stem.lower()) if word in _SPLIT_WORDS), None)
        if split is None:
            nameless.append(file)
        else:
            found.setdefault(split, []).append(file)
    if found and nameless:
        raise DataError(
            f"The folder {folder} has files of the split{'s' * (len(found) > 1)} {', '.join(found)}, and "
            f"{nameless[0].name}, whose name says none. Name one file, or put 'train' into its name."
        )
    return found or {"train": files}


def _load_hub(name: str) -> dict[str, Dataset]:
    def load() -> Any:
        plain, _, revision = name.partition("@")
        return load_dataset(plain, revision=revision or None)

    return dict(_read_naming(name, load))


def _read_naming(source: object, load: Callable[[], Any]) -> Any:
    """Call a loader; whatever it raises becomes a `DataError` that names the source."""
    try:
        return load()
    except Exception as error:
        # Each loader has its own errors, StopIteration and RecursionError among them.
        reason = one_line(error.__cause__ or error) or type(error).__name__
        raise DataError(f"The data set {source} cannot be read: {reason}") from error
