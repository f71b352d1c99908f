"""Finding and reading data sets: files, folders, the Hub; their splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_plugins.errors import DataError
from lora_plugins.training.parser import held_out_share

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from lora_plugins.training.arguments import RecipeArguments

#: Loader of ``datasets`` by the end of a file's name.
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_examples(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on and those to evaluate on.

    Args:
        recipe: Says which data sets and splits.
        seed: Decides which rows are held out where a share of them is.

    Raises:
        DataError: Something is not there, unreadable, empty, or has other splits.
    """
    train = load_split(recipe.dataset, recipe.train_split)
    if recipe.eval_dataset is not None:
        name = recipe.eval_split or _only_split(recipe.eval_dataset, recipe.train_split)
        return train, load_split(recipe.eval_dataset, name)
    share = held_out_share(recipe)
    if share is None:
        return train, load_split(recipe.dataset, recipe.eval_split) if recipe.eval_split else None
    count = round(len(train) * share)
    if not 0 < count < len(train):
        raise DataError(
            f"--eval_split {share} of {len(train)} examples is {count}: nothing is left for one of the two."
        )
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def load_split(source: str, split: str) -> Dataset:
    """Read one split of a data set.

    Args:
        source: A file, a folder of files, a folder that ``save_to_disk`` wrote, or a Hub id. What looks like a path
            (a known ending, or a beginning of ``/``, ``.`` or ``~``) or is there as one is not asked of the Hub.
        split: Name of the split.

    Raises:
        DataError: It is not there, unreadable, empty, or has no such split.
    """
    path = Path(source).expanduser()
    is_path = path.suffix in LOADERS or source.startswith(("/", ".", "~")) or path.exists()
    rows = _load_path(path, split) if is_path else _load_hub(source, split)
    if not len(rows):
        raise DataError(f"The split {split!r} of {source} is empty.")
    return rows


def _load_path(path: Path, split: str) -> Dataset:
    if not path.exists():
        raise DataError(f"The data set {path} is not there.")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        return _choose(_reading(path, lambda: load_from_disk(str(path))), split, str(path))
    files, loader = _data_files(path)

    def load() -> Any:
        from datasets import load_dataset

        return load_dataset(loader, data_files=[str(file) for file in files])

    # Data files have no splits: all of them are what was asked for.
    return _reading(path, load)["train"]


def _data_files(path: Path) -> tuple[list[Path], str]:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in LOADERS)
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
    return files, loader


def _load_hub(name: str, split: str) -> Dataset:
    def load() -> Any:
        from datasets import load_dataset

        return load_dataset(name)

    return _choose(_reading(name, load), split, name)


def _choose(found: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    from datasets import DatasetDict

    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(found)}. Choose with --train_split.")
    return found[split]


def _only_split(source: str, fallback: str) -> str:
    """The split of a data set that has one; files and saved data sets without splits take any name."""
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file():
        import json

        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if len(splits) == 1:
            return str(splits[0])
    return fallback


def _reading(source: object, load: Callable[[], Any]) -> Any:
    """Read, and name the source in whatever goes wrong: each loader has its own errors."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"The data set {source} can't be read: {reason}") from error
