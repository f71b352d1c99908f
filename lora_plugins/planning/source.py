"""Make a model on the meta device from a configuration or a live model."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from lora_plugins.adapters.saving import is_local_path
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import PlanError
from lora_plugins.planning.layers import make_stand_in_of
from lora_plugins.planning.limits import LimitedBuilding, check_numbers
from lora_plugins.planning.stacks import make_planned_stack_of
from lora_plugins.plugins.formats import Format
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.formats import check_config
from lora_plugins.quantization.request import Quantization, detect_quantization, owner_of
from lora_plugins.quantization.stacks import QuantizedStack
from lora_plugins.text import did_you_mean, one_line

__all__ = ["TASKS", "copy_without_data", "find_base", "meta_model", "read_config", "read_stored"]


#: Task -> transformers class that builds the model; by default the first class that knows the configuration.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


def meta_model(
    source: Any,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a model on the meta device; a live model stays as it is, and its data are not copied.

    Args:
        source: A live model, a configuration of transformers, a mapping, a ``config.json``, a folder, or a Hub id.
        task: One of `TASKS`; by default what the configuration's ``architectures`` says, else the first that fits.
        dtype: Dtype of the weights; by default the configuration's, else float32. Not for a live model.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        PlanError: The model cannot be found, or transformers cannot build it.
    """
    if isinstance(source, nn.Module):
        if dtype is not None or task is not None:
            raise PlanError("task and dtype belong to a configuration or a name; a live model has both already.")
        return copy_without_data(source)
    config = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    return _make_model(config, task, _choose_dtype(dtype, config), trust_remote_code)


def read_config(source: Any, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the configuration that a source names.

    Raises:
        PlanError: It cannot be read, or has implausibly large numbers.
    """
    if isinstance(source, PreTrainedConfig):
        check_numbers(source, "the configuration")
        return source
    if isinstance(source, Mapping):
        return _make_config(dict(source), "the mapping")
    if not isinstance(source, (str, os.PathLike)):
        raise PlanError(
            f"plan() takes a model, a configuration, a mapping, a file, a folder or a Hub id, not {source!r}"
        )
    path = Path(os.path.expanduser(source))
    if path.is_file():
        try:
            return _make_config(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{path} is not a configuration file: {one_line(error)}") from None
    if not path.exists() and (isinstance(source, os.PathLike) or is_local_path(source)):
        raise PlanError(f"The file or folder {source} does not exist. Give a folder, a configuration file or a Hub id.")
    if path.is_dir() and not (path / "config.json").exists():
        raise PlanError(f"The folder {source} has no config.json, so it is not a model.")
    try:
        name = str(path if path.exists() else source)
        values, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        check_numbers(values, name)
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except PlanError:
        raise
    except Exception as error:
        # The code of each model type computes with the configuration's numbers and may raise anything.
        raise PlanError(f"No configuration for {str(source)!r}: {_shorten(error)}") from error


def find_base(source: Any, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the most that is known of a base without loading it: the live model, its folder, or its configuration.

    Raises:
        PlanError: The configuration cannot be read.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, (str, os.PathLike)) and Path(os.path.expanduser(source)).is_dir():
        return Path(os.path.expanduser(source))
    config = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(source, str) or Path(os.path.expanduser(source)).is_file():
        return config
    cached = try_to_load_from_cache(source, "config.json", revision=getattr(config, "_commit_hash", None))
    return Path(cached).parent if isinstance(cached, str) else config


def _make_config(values: Any, where: str) -> Any:
    model_type = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(model_type, str):
        raise PlanError(f"{where} names no model_type, so it is not the configuration of a model.")
    check_numbers(values, where)
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:
        # As above.
        raise PlanError(f"transformers cannot read {where}: {_shorten(error)}") from error


def _shorten(error: Exception) -> str:
    """Return an error's class and message on one line, cut: some messages of transformers list all model types."""
    text = one_line(error)
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:300] + ' …'}"


def _choose_dtype(wanted: str | torch.dtype | None, config: Any) -> torch.dtype:
    if wanted is None:
        wanted = getattr(config, "dtype", None) or torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    found = getattr(torch, wanted.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(f"dtype must be a float dtype such as 'float32', 'bfloat16' or 'float16', not {wanted!r}")
    return found


def _make_model(config: Any, task: str | None, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    make = _find_factory(config, task, trust_remote_code)
    # Building a model writes into its configuration; the caller's object must stay as it is.
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), LimitedBuilding():
            model: nn.Module = make(config, dtype=dtype)
    except PlanError:
        raise
    except Exception as error:
        # As above: a model's own code may raise anything about numbers that do not fit together.
        raise PlanError(
            f"transformers cannot make a model from this {config.model_type!r} configuration: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    _keep_in_float32(model, dtype)
    return model


def _find_factory(config: Any, task: str | None, trust_remote_code: bool) -> Any:
    if task is not None and task not in TASKS:
        hint = did_you_mean(task, TASKS)
        raise PlanError(f"Unknown task {task!r}.{hint} Known: {', '.join(TASKS)}.")
    remote = getattr(config, "auto_map", None) or {}
    named = _find_named_class(config)
    if task is None and named is not None:
        return named._from_config
    for name in [TASKS[task]] if task else TASKS.values():
        auto = getattr(transformers, name)
        if name in remote and trust_remote_code:
            return lambda config, dtype: auto.from_config(config, dtype=dtype, trust_remote_code=True)
        if type(config) in auto._model_mapping:
            return auto.from_config
    wanted = f" for {task}" if task else ""
    raise PlanError(
        f"transformers has no model{wanted} of type {config.model_type!r}. Known tasks: {', '.join(TASKS)}. "
        "Pass the model itself, or trust_remote_code=True where its code comes with it."
    )


def _find_named_class(config: Any) -> Any:
    """Return the transformers class that a configuration's ``architectures`` names, ``None`` for anything else."""
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, (list, tuple)) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Cast to float32 the weights that `from_pretrained` keeps in float32."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters() if names and dtype != torch.float32 else ():
        if names & set(path.split(".")):
            parameter.data = parameter.data.to(torch.float32)


def copy_without_data(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device; stand-ins of the same size replace quantized layers."""
    memo: dict[int, Any] = {}
    arrived = detect_quantization(model)
    options = arrived.options if arrived is not None else {}
    for module in model.modules():
        owner = owner_of(module)
        if owner is not None:
            memo[id(module)] = make_stand_in_of(module, owner, options)
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedStack):
            memo[id(parameter)] = make_planned_stack_of(parameter)
            continue
        empty = torch.empty(_read_shape(parameter), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(tuple(buffer.shape), dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, memo)


def _read_shape(parameter: Any) -> tuple[int, ...]:
    # ZeRO-3 empties the tensor and keeps its real shape in ds_shape.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def read_stored(config: Any, settings: LoraSettings) -> tuple[LoraSettings, list[str]]:
    """Return the settings with the backend that a configuration says the base is stored with, and notes.

    Args:
        config: A model's configuration.
        settings: What was asked for.

    Raises:
        UntrainableFormat: Adapters cannot be trained on a base of this format.
        PlanError: Another backend was asked for, or the stored options cannot be read.
    """
    record = check_config(config, settings.allow_format)
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return settings, []
    if record is not None and record.trains == "float":
        return settings, [
            f"the base's files are {record.title} (quant_method {record.method!r}); its weights are counted in float, "
            f"as it trains: {record.needs}"
        ]
    if record is None or record.trains != "stored":
        raise PlanError(
            f"The base is stored as quant_method {settings.allow_format!r}, whose bytes no backend here knows, so "
            "there is nothing to plan with. Plan for the float model that it was made from."
        )
    found = _find_backend(declared, record)
    asked = settings.quantization
    if asked is not None and asked.name != found.name:
        raise PlanError(
            f"quantization={asked.name!r} was asked for and the base is stored with {found.name!r}. "
            "Name the float model that it was made from, or leave quantization out."
        )
    return replace(settings, quantization=found), [f"the base is stored with {found.name!r}, which {record.title} is"]


def _find_backend(declared: Any, record: Format) -> Quantization:
    try:
        config = AutoQuantizationConfig.from_dict(dict(declared)) if isinstance(declared, Mapping) else declared
    except (ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(
            f"The base is stored as {record.title} and transformers cannot read how: {one_line(error)}"
        ) from (error)
    for name in record.backends:
        quantizer = plugin_host().quantizer(name)
        options = quantizer.loaded_options(config) if quantizer.reads(config) else None
        if options is not None:
            return Quantization(quantizer, {"skip_modules": [], **options})
    raise PlanError(
        f"The base is stored as {record.title} with settings that no backend here reads "
        f"({', '.join(record.backends)}), so its bytes are not known. Plan for the float model that it was made from."
    )
