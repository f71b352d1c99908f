"""Write a new plugin package from templates."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from lora_plugins.errors import PluginError

__all__ = ["FILES", "write_package"]


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1.0"
description = "Where LoRA adapters go in models of the type $name"
requires-python = ">=3.11"
dependencies = ["lora-plugins"]

[project.entry-points.lora_plugins]
$module = "$module"

[tool.setuptools]
py-modules = ["$module"]
"""

_MODULE = '''\
"""Where LoRA adapters go in models of the type $name. Loaded by every command: import nothing heavy here."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [
        Architecture(
            "$name",
            # Names of the modules that get adapters by default.
            ($targets),
            # scopes={"attention": (…), "mlp": (…)},  for target_modules="attention"
            # never=(…),  routers and weights that are read without calling the layer
        )
    ]
'''

_TEST = '''\
"""The plugin trains the default targets. Put your own model in the place of this small one."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lora_plugins.testing import check_architecture

TARGETS = [$targets]


class Config(PreTrainedConfig):
    model_type = "$name"
    vocab_size: int = 64
    hidden_size: int = 32


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(width, width) for name in TARGETS})

    def forward(self, x):
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x))
        return x


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config.hidden_size) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))


def test_default_trains_saves_and_reloads():
    plan = check_architecture(lambda: Model(Config()))
    assert {hit.name for hit in plan.hits} == set(TARGETS)
'''

_README = """\
# $package

Tells `lora-plugins` where LoRA adapters go in models of the type `$name`.

    pip install -e .
    pytest
    lora-plugins plugins
"""

#: Path in the package -> template.
FILES = {
    "pyproject.toml": _PYPROJECT,
    "$module.py": _MODULE,
    "tests/test_$module.py": _TEST,
    "README.md": _README,
}


def write_package(name: str, folder: Path | None, targets: tuple[str, ...]) -> Path:
    """Write a plugin package for a model type.

    Args:
        name: The model type.
        folder: Where to write it; by default ``NAME-lora`` in the working directory.
        targets: Names of the modules that get adapters by default.

    Returns:
        The folder.

    Raises:
        PluginError: A name is invalid, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise PluginError(f"{name!r} is not a valid model type: use small letters, digits, '-' and '_', as in my_type")
    for target in targets:
        if not target.isidentifier() or keyword.iskeyword(target):
            raise PluginError(f"{target!r} is not a valid module name; write the last part of its path, as in q_proj")
    package = f"{name.replace('_', '-')}-lora"
    folder = folder or Path(package)
    if folder.exists():
        raise PluginError(f"{folder} exists already; name another folder with --folder")
    values = {
        "name": name,
        "package": package,
        "module": f"{name.replace('-', '_')}_lora",
        "targets": "".join(f'"{target}", ' for target in targets).rstrip(" "),
    }
    for path, text in FILES.items():
        file = folder / Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")
    return folder
