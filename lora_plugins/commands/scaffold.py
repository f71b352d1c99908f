"""Write a new plugin package from templates."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from lora_plugins.errors import PluginError

__all__ = ["ARCHITECTURE", "BACKEND", "write_package"]


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1.0"
description = "$description"
requires-python = ">=3.11"
dependencies = ["lora-plugins"]

[project.entry-points.lora_plugins]
$module = "$module"

[tool.setuptools]
py-modules = [$modules]
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
            ($targets$comma),
            # scopes={"attention": (…), "mlp": (…)},  for target_modules="attention"
            # never=(…),  routers and weights that are read without calling the layer
        )
    ]
'''

_TEST = '''\
"""The plugin trains the default targets. Put your own model in the place of this small one."""

import torch
from lora_plugins.testing import check_architecture
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

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

_BACKEND = '''\
"""The quantization backend $name. Loaded by every command: import nothing heavy here."""

from lora_plugins import ExpertsAsLayers, Quantizer, hookimpl


class Backend(Quantizer):
    name = "$name"
    bits = 8
    # requires = ("library>=1.0",)  what it needs besides torch, as pip takes it

    def available(self, device, dtype, options):
        return None  # or the reason why it cannot run here

    def quantize_linear(self, linear, options):
        from ${module}_layer import QuantizedLinear

        return QuantizedLinear(linear)

    def owns(self, module):
        from ${module}_layer import QuantizedLinear

        return isinstance(module, QuantizedLinear)

    def dequantize(self, module):
        return module.dequantize()

    def layer_bytes(self, in_features, out_features, dtype, options):
        return in_features * out_features + 4 * out_features

    def expert_format(self, options):
        return ExpertsAsLayers(self, options)


@hookimpl
def register_quantizers():
    return [Backend()]
'''

_LAYER = '''\
"""The layer of the backend $name: eight bits a weight, a scale for each output. Put your own format in its place."""

import torch
from torch import nn


class QuantizedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantize(self):
        return self.weight * self.scale

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize().to(x.dtype), bias)
'''

_BACKEND_TEST = '''\
"""The backend can be trained on, states its sizes, and is near to the weights that it stores."""

import torch
from lora_plugins.testing import check_quantizer
from torch import nn

from ${module} import Backend


def test_backend_trains_and_states_its_sizes():
    check_quantizer(Backend())


def test_weights_come_back_within_half_a_step():
    linear = nn.Linear(64, 32)
    layer = Backend().quantize_linear(linear, {})
    step = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.dequantize() - linear.weight).abs() <= 0.51 * step).all()
    assert torch.isfinite(layer(torch.randn(2, 64))).all()
'''

_README = """\
# $package

$about

    pip install -e . pytest
    pytest
    lora-plugins plugins
"""


@dataclass(frozen=True)
class _Kind:
    """What one kind of package consists of.

    Attributes:
        suffix: What its name ends with.
        description: Its summary, with the name in it.
        about: The first sentence of its README.
        files: Path in the package -> template.
        modules: Its modules after the first, by what is added to the first one's name.
    """

    suffix: str
    description: str
    about: str
    files: Mapping[str, str]
    modules: tuple[str, ...] = ()


ARCHITECTURE = _Kind(
    "lora",
    "Where LoRA adapters go in models of the type $name",
    "Tells `lora-plugins` where LoRA adapters go in models of the type `$name`.",
    {"$module.py": _MODULE, "tests/test_$module.py": _TEST},
)

BACKEND = _Kind(
    "quantizer",
    "The quantization backend $name for lora-plugins",
    'The quantization backend `$name` for `lora-plugins`: `LoraCallback(quantization="$name")`.',
    {"$module.py": _BACKEND, "${module}_layer.py": _LAYER, "tests/test_$module.py": _BACKEND_TEST},
    ("_layer",),
)


def write_package(name: str, folder: Path | None, targets: tuple[str, ...] = (), kind: _Kind = ARCHITECTURE) -> Path:
    """Write a plugin package for a model type or for a quantization backend.

    Args:
        name: The model type, or the backend.
        folder: Where to write it; by default ``NAME-lora`` or ``NAME-quantizer`` in the working directory.
        targets: Names of the modules that get adapters by default, for a model type.
        kind: `ARCHITECTURE` or `BACKEND`.

    Returns:
        The folder.

    Raises:
        PluginError: A name is invalid, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise PluginError(f"{name!r} is not a valid name: use small letters, digits, '-' and '_', as in my_type")
    for target in targets:
        if not target.isidentifier() or keyword.iskeyword(target):
            raise PluginError(f"{target!r} is not a valid module name; write the last part of its path, as in q_proj")
    package = f"{name.replace('_', '-')}-{kind.suffix}"
    folder = folder or Path(package)
    if folder.exists():
        raise PluginError(f"{folder} exists already; name another folder with --folder")
    module = f"{name.replace('-', '_')}_{kind.suffix}"
    values = {
        "name": name,
        "package": package,
        "module": module,
        "modules": ", ".join(f'"{module}{more}"' for more in ("", *kind.modules)),
        "description": Template(kind.description).substitute(name=name),
        "about": Template(kind.about).substitute(name=name),
        "targets": ", ".join(f'"{target}"' for target in targets),
        "comma": "," if len(targets) == 1 else "",
    }
    for path, text in {"pyproject.toml": _PYPROJECT, "README.md": _README, **kind.files}.items():
        file = folder / Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")
    return folder
