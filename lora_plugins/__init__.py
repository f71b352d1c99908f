"""Turn an existing Hugging Face Trainer into a quantized LoRA run, with one callback.

Importing this package loads neither torch nor transformers nor peft; what needs them is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_plugins.casting import CastsInput
from lora_plugins.hookspecs import hookimpl
from lora_plugins.packages import missing_package
from lora_plugins.types import Architecture, Quantizer

if TYPE_CHECKING:
    from lora_plugins.callbacks import Int8PreparationCallback as Int8PreparationCallback
    from lora_plugins.callbacks import LoraCallback as LoraCallback
    from lora_plugins.callbacks import ParameterReportCallback as ParameterReportCallback
    from lora_plugins.callbacks import attach as attach
    from lora_plugins.callbacks import detach as detach
    from lora_plugins.dequantization import dequantize_model as dequantize_model
    from lora_plugins.model import prepare_model as prepare_model
    from lora_plugins.planning.planner import plan as plan
    from lora_plugins.quantization import quantization_config as quantization_config

_LAZY = {
    "Int8PreparationCallback": "lora_plugins.callbacks",
    "LoraCallback": "lora_plugins.callbacks",
    "ParameterReportCallback": "lora_plugins.callbacks",
    "attach": "lora_plugins.callbacks",
    "dequantize_model": "lora_plugins.dequantization",
    "detach": "lora_plugins.callbacks",
    "plan": "lora_plugins.planning.planner",
    "prepare_model": "lora_plugins.model",
    "quantization_config": "lora_plugins.quantization",
}

__all__ = [
    "Architecture",
    "CastsInput",
    "Int8PreparationCallback",
    "LoraCallback",
    "ParameterReportCallback",
    "Quantizer",
    "attach",
    "dequantize_model",
    "detach",
    "hookimpl",
    "missing_package",
    "plan",
    "prepare_model",
    "quantization_config",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lora_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
