"""Turn a Hugging Face Trainer into a quantized LoRA run by one callback.

Importing this package loads neither torch nor transformers nor peft; what needs them is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_plugins.plugins.casting import CastsInput
from lora_plugins.plugins.formats import Format
from lora_plugins.plugins.hookspecs import hookimpl
from lora_plugins.plugins.packages import missing_package
from lora_plugins.plugins.servers import AdapterTraits, Server, ServerRule, ServingVerdict
from lora_plugins.plugins.types import Architecture, ExpertFormat, ExpertsAsLayers, Quantizer

if TYPE_CHECKING:
    from lora_plugins.adapters.prepare import prepare_model as prepare_model
    from lora_plugins.merging.merge import merge_and_save as merge_and_save
    from lora_plugins.planning.planner import plan as plan
    from lora_plugins.plugins.host import plugin_checks as plugin_checks
    from lora_plugins.plugins.traits import check_servers as check_servers
    from lora_plugins.plugins.traits import judge_adapter as judge_adapter
    from lora_plugins.quantization.dequantization import dequantize_model as dequantize_model
    from lora_plugins.quantization.precision import loading_dtype as loading_dtype
    from lora_plugins.quantization.request import quantization_config as quantization_config
    from lora_plugins.recipe.best_fit.batches import best_fit_collator as best_fit_collator
    from lora_plugins.recipe.best_fit.bins import pack_best_fit as pack_best_fit
    from lora_plugins.recipe.packing import pack as pack
    from lora_plugins.serving.check import check_serving as check_serving
    from lora_plugins.serving.export import export_adapter as export_adapter
    from lora_plugins.serving.trial import open_trial as open_trial
    from lora_plugins.targets.resolution import resolve_targets as resolve_targets
    from lora_plugins.trainer.attaching import attach as attach
    from lora_plugins.trainer.attaching import detach as detach
    from lora_plugins.trainer.callbacks import Int8PreparationCallback as Int8PreparationCallback
    from lora_plugins.trainer.callbacks import LoraCallback as LoraCallback
    from lora_plugins.trainer.callbacks import ParameterReportCallback as ParameterReportCallback

_LAZY = {
    "Int8PreparationCallback": "lora_plugins.trainer.callbacks",
    "LoraCallback": "lora_plugins.trainer.callbacks",
    "ParameterReportCallback": "lora_plugins.trainer.callbacks",
    "attach": "lora_plugins.trainer.attaching",
    "best_fit_collator": "lora_plugins.recipe.best_fit.batches",
    "dequantize_model": "lora_plugins.quantization.dequantization",
    "detach": "lora_plugins.trainer.attaching",
    "check_servers": "lora_plugins.plugins.traits",
    "check_serving": "lora_plugins.serving.check",
    "export_adapter": "lora_plugins.serving.export",
    "judge_adapter": "lora_plugins.plugins.traits",
    "loading_dtype": "lora_plugins.quantization.precision",
    "merge_and_save": "lora_plugins.merging.merge",
    "open_trial": "lora_plugins.serving.trial",
    "pack": "lora_plugins.recipe.packing",
    "pack_best_fit": "lora_plugins.recipe.best_fit.bins",
    "plan": "lora_plugins.planning.planner",
    "plugin_checks": "lora_plugins.plugins.host",
    "prepare_model": "lora_plugins.adapters.prepare",
    "quantization_config": "lora_plugins.quantization.request",
    "resolve_targets": "lora_plugins.targets.resolution",
}

__all__ = [
    "AdapterTraits",
    "Architecture",
    "CastsInput",
    "ExpertFormat",
    "ExpertsAsLayers",
    "Format",
    "Int8PreparationCallback",
    "LoraCallback",
    "ParameterReportCallback",
    "Quantizer",
    "Server",
    "ServerRule",
    "ServingVerdict",
    "attach",
    "best_fit_collator",
    "check_servers",
    "check_serving",
    "dequantize_model",
    "detach",
    "export_adapter",
    "hookimpl",
    "judge_adapter",
    "loading_dtype",
    "merge_and_save",
    "missing_package",
    "open_trial",
    "pack",
    "pack_best_fit",
    "plan",
    "plugin_checks",
    "prepare_model",
    "quantization_config",
    "resolve_targets",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lora_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
