"""The core names no quantization backend: what it knows of one, it knows through the hook."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_plugins.plugins.host import plugin_host
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.request import owner_of, parse_quantization
from lora_plugins.quantization.selftest import _silence

ROOT = Path(__file__).parent.parent / "lora_plugins"
CORE = ("models", "plugins", "quantization", "targets", "adapters", "trainer", "planning", "recipe", "commands")
LIBRARIES = ("bitsandbytes", "bnb", "torchao", "quanto", "hqq", "compressed_tensors")

#: Where a name is data that users see, not knowledge about a backend.
ALLOWED = {
    ("plugins/host.py", "bitsandbytes"): "the tuple of built-in plugins",
    ("plugins/host.py", "hqq"): "the same",
    ("plugins/host.py", "compressed_tensors"): "the same",
    ("plugins/host.py", "quanto"): "the same",
    ("plugins/host.py", "torchao"): "the same",
    ("trainer/callbacks.py", "int8"): "default of Int8PreparationCallback(quantization=)",
    ("trainer/refusals.py", "bitsandbytes"): "optimizers, not a backend",
    ("recipe/parser.py", "int8"): "help text: what the recipe's default is",
    ("recipe/arguments.py", "int8"): "default of --quantization",
    ("recipe/arguments.py", "nf4"): "examples in help texts",
    ("commands/demo/command.py", "int8"): "default of the demo",
    ("commands/scaffold.py", "int8"): "torch's dtype, in a template",
}


def words() -> re.Pattern[str]:
    names = sorted({*LIBRARIES, *plugin_host().quantizer_names()}, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])")


def texts(source: str) -> Iterator[str]:
    """Identifiers, imported names and strings of a module, without its docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield " ".join([getattr(node, "module", None) or "", *(alias.name for alias in node.names)])


def find_names(source: str) -> set[str]:
    return {match for text in texts(source) for match in words().findall(text.replace(".", " "))}


def test_the_core_names_no_backend() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for room in CORE
        for path in (ROOT / room).rglob("*.py")
        for name in find_names(path.read_text())
    }
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "line",
    ["import bitsandbytes", "from torchao.quantization import quantize_", "KNOWN = ('nf4',)", "bnb = None"],
)
def test_a_name_of_a_backend_is_found(line: str) -> None:
    assert find_names(line)
    assert not find_names(f'"""{line}"""\nx = 1')


# -- what the hook says instead ----------------------------------------------------------------


def linear() -> nn.Linear:
    return nn.Linear(64, 64, bias=False).requires_grad_(False)


@pytest.mark.parametrize("name", ["int8", "nf4", "int8-torchao", "int8-hqq"])
def test_the_hook_says_whether_a_layer_holds_its_weight_twice(name: str) -> None:
    found = parse_quantization(name)
    assert found is not None
    layer = found.quantize(linear())
    owner = owner_of(layer)
    assert owner is not None
    assert owner.copies_weight == hasattr(getattr(layer, "state", None), "CB")


@pytest.mark.parametrize("name", ["int8", "nf4", "int8-torchao", "float8-torchao", "int8-quanto", "int8-hqq"])
def test_the_engines_of_a_backend_are_those_that_can_hold_its_layers(name: str) -> None:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    found = parse_quantization(name)
    assert found is not None
    layer = found.quantize(linear())
    wraps = any(is_traceable_wrapper_subclass(p) for p in layer.parameters())
    own_form = type(layer).state_dict is not nn.Module.state_dict
    expected = {"ddp", *(["fsdp2"] if not own_form else []), *(["deepspeed"] if not wraps else [])}
    assert set(found.quantizer.engines) == expected


def test_noisy_loggers_are_silent_during_the_self_test_and_after_it_as_they_were() -> None:
    import logging

    logger = logging.getLogger("a library of kernels")
    logger.setLevel(logging.INFO)
    with _silence(["a library of kernels"]):
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.level == logging.INFO
    assert all(isinstance(quantizer.loggers, tuple) for quantizer in plugin_host().quantizers())


def test_backends_of_the_same_size_come_by_their_priority() -> None:
    import tiny

    from lora_plugins import plan

    order = list(dict.fromkeys(row.quantization for row in plan(tiny.llama(), length=8).rows))
    assert order[:2] == ["", "int8"]
    four = [name for name in order if name and plugin_host().quantizer(name).bits == 4]
    assert four[0] == "nf4"


def test_a_backend_of_a_plugin_needs_none_of_it() -> None:
    class Plain(Quantizer):
        name, bits = "plain", 8

        def available(self, device: torch.device, dtype: torch.dtype, options: object) -> None:
            return None

        def quantize_linear(self, linear: nn.Linear, options: object) -> nn.Module:
            return linear

        def owns(self, module: nn.Module) -> bool:
            return False

        def dequantize(self, module: nn.Module) -> torch.Tensor:
            return torch.empty(0)

    plain = Plain()
    assert (plain.copies_weight, plain.loggers, plain.priority) == (False, (), 0)
    assert plain.engines == ("ddp", "fsdp2", "deepspeed")
    assert plain.loaded_options(object()) is None
