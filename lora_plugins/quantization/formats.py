"""Find the format that a base is stored in, and refuse what cannot train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lora_plugins.errors import UntrainableFormat
from lora_plugins.models.checkpoint import read_stored_config
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.formats import Format
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.quantization.request import detect_quantization, is_float, owner_of, unknown_layers
from lora_plugins.text import did_you_mean

__all__ = [
    "check_config",
    "check_format",
    "read_allowed",
    "read_dequantized",
    "read_method",
    "stored_format",
    "write_refusal",
]


#: Attribute of a base whose weights were dequantized while it was loaded: the format that its files have.
_ORIGIN = "lora_plugins_stored_format"
#: Attribute of a base that is trained although its format is refused: the format.
_ALLOWED = "lora_plugins_allowed_format"


def read_method(config: Any) -> str | None:
    """Return the format that a quantization config names, as transformers' table of quantizers spells it.

    Args:
        config: ``quantization_config`` of a model, as an object or as it stands in ``config.json``.
    """
    if config is None:
        return None
    fields = config if isinstance(config, Mapping) else vars(config)
    method = fields.get("quant_method", getattr(config, "quant_method", None))
    method = getattr(method, "value", method)
    # One config class of transformers stands for two quantizers, which its table tells apart by these suffixes.
    for bits, flag in (("4bit", "load_in_4bit"), ("8bit", "load_in_8bit")):
        if isinstance(method, str) and fields.get(flag, fields.get("_" + flag)):
            return f"{method}_{bits}"
    return str(method) if method is not None else None


def _list_declared(model: nn.Module) -> Iterator[str]:
    """Yield the formats that a model's configurations and its quantizer declare."""
    seen = set()
    for module in model.modules():
        inner: Any = module
        quantizer = vars(inner).get("hf_quantizer")
        for config in (
            getattr(quantizer, "quantization_config", None),
            getattr(getattr(inner, "config", None), "quantization_config", None),
        ):
            method = read_method(config)
            if method is not None and method not in seen:
                seen.add(method)
                yield method


def read_dequantized(model: nn.Module) -> str | None:
    """Return the format that a base's files have if its weights were dequantized while it was loaded.

    transformers takes its flags off such a model. In 5.23 the conversions by which it read the files still hold the
    quantizer; 5.24 drops them, and the files' own configuration tells it where they are on this machine.
    `check_format` remembers what it found here on the model.
    """
    known = getattr(model, _ORIGIN, None)
    if isinstance(known, str):
        return known
    return _read_conversions(model) or _read_files(model)


def _read_conversions(model: nn.Module) -> str | None:
    for conversion in vars(model).get("_weight_conversions") or ():
        for operation in getattr(conversion, "operations", ()):
            quantizer = getattr(operation, "hf_quantizer", None)
            config = getattr(quantizer, "quantization_config", None)
            if getattr(config, "dequantize", False):
                return read_method(config)
    return None


def _read_files(model: nn.Module) -> str | None:
    """Return the format that the files of a float model declare, if it is one that loading dequantizes."""
    if next(_list_declared(model), None) is not None:
        return None
    declared = read_stored_config(model).get("quantization_config")
    method = read_method(declared) if isinstance(declared, dict) else None
    record = plugin_host().format(method) if method is not None else None
    return method if record is not None and record.trains == "float" else None


def read_allowed(model: nn.Module) -> str | None:
    """Return the format of a base that is trained because the user insisted, ``None`` for any other base."""
    return getattr(model, _ALLOWED, None)


def stored_format(model: nn.Module) -> str | None:
    """Return the format that a base's files have, ``None`` for a float base."""
    return next(_list_declared(model), None) or read_dequantized(model)


def check_format(model: nn.Module, allowed: str | None = None, host: PluginHost | None = None) -> list[str]:
    """Refuse a base that is stored in a format which cannot train adapters here, or is not known.

    A module's class and tensors decide, and the declared format: a base whose weights are all plain float trains,
    whatever a format that is known to be dequantized while loading says.

    Args:
        model: The base, or a model with adapters around it.
        allowed: Name of the format that the user insists on.
        host: Where formats and backends are looked up; default is the process's plugin host.

    Returns:
        Sentences for the report.

    Raises:
        UntrainableFormat: The format is refused; the message names it and says what to load instead.
    """
    host = host or plugin_host()
    base = base_of(model)
    unknown = unknown_layers(base, host)
    methods = list(_list_declared(base)) or _find_by_class(base, unknown, host)
    notes = []
    for method in methods:
        reason = _find_reason(base, method, unknown, host)
        if reason is None:
            continue
        if method != allowed:
            raise UntrainableFormat(write_refusal(method, reason, host, allowed, unknown))
        setattr(base, _ALLOWED, method)
        notes.append(f"the base is stored as {_name(method, host)}; it was allowed by name and never tried here")
    origin = read_dequantized(base)
    if origin is not None and not unknown:
        notes.append(_note_float(base, origin, host))
    return notes


def _note_float(base: Any, method: str, host: PluginHost) -> str:
    setattr(base, _ORIGIN, method)
    return (
        f"the base's files are {_name(method, host)}; transformers dequantized them while loading, so its weights "
        "are float and take the memory of float weights"
    )


def _find_reason(base: nn.Module, method: str, unknown: Mapping[str, str], host: PluginHost) -> str | None:
    """Return why a declared format is refused, ``None`` if the base can be trained on."""
    record = host.format(method)
    owned = detect_quantization(base, host) is not None
    if record is None:
        if method in host.quantizer_names():
            # The mark of a base that was quantized in place.
            return None
        return None if owned and not unknown else "no plugin describes this format, so nothing is known of its layers"
    if owned and not unknown and record.trains == "stored":
        return _find_unready(base, host)
    if not owned and is_float(base, host) and record.trains != "no":
        unread = _find_unread(method)
        if unread is not None:
            return unread
        setattr(base, _ORIGIN, method)
        return None
    return record.reason or "its layers are of a kind that no registered backend reads"


def _find_unread(method: str) -> str | None:
    """Return why float weights of a format are not its weights: transformers skips a format that it does not know."""
    if method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return None
    return (
        f"transformers {transformers.__version__} does not know this format, and reads the stored numbers as weights "
        "without their scales"
    )


def _find_unready(base: nn.Module, host: PluginHost) -> str | None:
    for module in base.modules():
        owner = owner_of(module, host)
        reason = owner.unready(module) if owner is not None else None
        if reason is not None:
            return reason
    return None


def _find_by_class(base: nn.Module, unknown: Mapping[str, str], host: PluginHost) -> list[str]:
    """Return the formats whose layer classes a base without any mark has."""
    kinds = {
        f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        for module in base.modules()
        if unknown
        for kind in type(module).__mro__
    }
    return [record.method for record in host.formats() if record.trains != "stored" and kinds & set(record.layers)]


def check_config(config: Any, allowed: str | None = None, host: PluginHost | None = None) -> Format | None:
    """Return the record of the format that a model's configuration declares, without loading the model.

    Args:
        config: A model's configuration.
        allowed: Name of the format that the user insists on.
        host: Where formats are looked up.

    Returns:
        The record; ``None`` for a float base, or one of a format that was allowed and has no record.

    Raises:
        UntrainableFormat: The format is refused.
    """
    host = host or plugin_host()
    method = read_method(getattr(config, "quantization_config", None))
    if method is None:
        return None
    record = host.format(method)
    unread = _find_unread(method) if record is not None and record.trains in ("stored", "float") else None
    if record is not None and record.trains in ("stored", "float") and unread is None:
        return record
    if method != allowed:
        reason = "no plugin describes this format" if record is None else unread or record.reason
        raise UntrainableFormat(write_refusal(method, reason, host, allowed))
    return record


def write_refusal(
    method: str,
    reason: str,
    host: PluginHost | None = None,
    allowed: str | None = None,
    unknown: Mapping[str, str] | None = None,
) -> str:
    """Return the message that refuses a format: its name, its layers, why, and what to load instead."""
    host = host or plugin_host()
    record = host.format(method)
    layers = ""
    if unknown:
        path, kind = next(iter(unknown.items()))
        layers = f" ({len(unknown)} layers, first {path}, a {kind})"
    instead = record.instead if record is not None and record.instead else "load a float model"
    if reason == _find_unread(method):
        instead = "install a release of transformers that knows it, or the package that registers it there"
    wrong = ""
    if allowed is not None:
        hint = did_you_mean(allowed, [one.method for one in host.formats()])
        wrong = f" allow_format={allowed!r} names another format.{hint}"
    return (
        f"The base is stored as {_name(method, host)}{layers} and adapters cannot be trained on it: {reason}. "
        f"Instead, {instead}.{wrong} To train on it all the same, without any check of its gradients, "
        f"allow_format={method!r} (--allow-format {method})."
    )


def _name(method: str, host: PluginHost) -> str:
    record = host.format(method)
    return f"{record.title} (quant_method {method!r})" if record is not None else f"quant_method {method!r}"
