"""The fingerprint that identifies a base model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.formats.records import Fingerprint, TensorPrint, TensorSource

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Comparison", "compare", "fingerprint", "original_name", "prints", "telling"]

#: Rows of a tensor that are hashed: few enough to be read from a hub in one request.
ROWS = 16
_VALUES = 8
#: Relative and absolute tolerance for two copies of one value, one of them in float16.
_ROUGHLY = (2.0**-7, 2.0**-13)
#: Configuration keys about how a model was loaded, run, trained or labeled, which do not define the computation.
_NOT_COMPUTED = re.compile(
    r"_.*|.*dtype|transformers_version|architectures|auto_map|use_cache|cache_implementation|quantization_config"
    r"|output_.*|return_dict|is_encoder_decoder|is_decoder|add_cross_attention|torchscript|use_return_dict"
    r"|.*_token_id|.*token_ids?|.*drop(out|path)?(_rate|_prob)?|pdrop|.*_pdrop|initializer_.*|pretraining_tp"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|name_or_path|model_type_hash"
    r"|vocab_size|gradient_checkpointing|chunk_size_feed_forward|attn_implementation|experts_implementation|language"
)
_NORM = re.compile(r"norm|(^|\.)ln_|_ln(\.|$)", re.IGNORECASE)
#: Name parts that adapters and compilation add; without them, a parameter has its original name.
_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.(base_layer|original_module|token_adapter)(?=\.)|(?<![^.])_orig_mod\.|(?<![^.])module\."
)
_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float64": "F64"}


@dataclass(frozen=True)
class Comparison:
    """Result of comparing two fingerprints.

    Attributes:
        configuration: Configuration differences: key, recorded value, value found.
        tensors: Names of the tensors that differ.
        verified: Whether at least one tensor was compared and none differs.
        read: Names of the tensors that were compared.
    """

    configuration: tuple[tuple[str, object, object], ...]
    tensors: tuple[str, ...]
    verified: bool
    read: tuple[str, ...] = ()


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of a model in memory, with or without adapters, from its unsharded tensors."""
    config: Any = getattr(model, "config", None)
    values = config_values(config.to_dict()) if hasattr(config, "to_dict") else {}
    found = {}
    for name, tensor in telling(model):
        shown = prints(tensor)
        if shown is not None:
            found[name] = shown
    return Fingerprint(values, found)


def config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration values that define the computation, nested keys joined with dots."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if _NOT_COMPUTED.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            values.update({f"{key}.{inner}": item for inner, item in config_values(value).items()})
        elif value is not None and _is_plain(value):
            values[str(key)] = _convert_to_json(value)
    return values


def _convert_to_json(value: Any) -> Any:
    """Return a plain value as JSON represents it: lists for tuples, strings for numbers that are not finite."""
    if isinstance(value, (list, tuple)):
        return [_convert_to_json(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 512 and all(isinstance(item, (str, int, float, bool)) for item in value)
    return isinstance(value, (int, float, bool)) or (isinstance(value, str) and len(value) <= 200)


def original_name(name: str) -> str:
    """Return a parameter's name before adapters and compilation changed it."""
    previous = None
    while previous != name:
        previous, name = name, _WRAPPERS.sub("", name)
    return name


def telling(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that distinguish models: the input embedding, the first and the last norm."""
    embedding = _find_embedding(model)
    norms = []
    for name, tensor in model.named_parameters():
        if "modules_to_save." in name or "lora_" in name:
            continue
        if embedding is not None and tensor is embedding:
            yield original_name(name), tensor
        elif tensor.ndim == 1 and name.endswith("weight") and _NORM.search(name):
            norms.append((original_name(name), tensor))
    yield from dict([*norms[:1], *norms[-1:]]).items()


def _find_embedding(model: nn.Module) -> torch.Tensor | None:
    try:
        layer: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    for wrapped in ("original_module", "base_layer"):
        while hasattr(layer, wrapped):
            layer = getattr(layer, wrapped)
    return getattr(layer, "weight", None)


def prints(tensor: torch.Tensor) -> TensorPrint | None:
    """Return the print of a tensor's first rows; ``None`` if its values are not available or not floating-point."""
    import torch

    dtype = _DTYPES.get(str(tensor.dtype))
    if dtype is None or tensor.device.type == "meta" or tensor.numel() == 0 or hasattr(tensor, "placements"):
        return None
    rows = tensor.detach()[:ROWS].to("cpu", torch.bfloat16).contiguous()
    head = f"{list(rows.shape)}".encode()
    data = rows.view(torch.int16).numpy().tobytes()
    values = tuple(float(value) for value in rows.flatten()[:: max(1, rows.numel() // _VALUES)][:_VALUES])
    return TensorPrint(hashlib.sha256(head + data).hexdigest(), dtype, values)


def compare(recorded: Fingerprint, config: Mapping[str, object], tensors: TensorSource | None) -> Comparison:
    """Compare a recorded fingerprint with a base model.

    Args:
        recorded: The fingerprint in the manifest.
        config: `config_values` of the base model. Keys that only one of the two has are skipped, because new releases
            of transformers add keys.
        tensors: Source of its tensors, if they can be read.
    """
    configuration = tuple(
        (key, value, config[key]) for key, value in recorded.config.items() if key in config and config[key] != value
    )
    compared, different = [], []
    for name, known in recorded.tensors.items():
        rows = tensors.rows(name, ROWS) if tensors is not None else None
        found = None if rows is None else prints(rows)
        if found is None:
            continue
        compared.append(name)
        if not _is_same(known, found):
            different.append(name)
    return Comparison(configuration, tuple(different), bool(compared) and not different, tuple(compared))


def _is_same(one: TensorPrint, other: TensorPrint) -> bool:
    if one.sha256 == other.sha256:
        return True
    if one.dtype == other.dtype or "F16" not in (one.dtype, other.dtype) or not one.values:
        return False
    relative, absolute = _ROUGHLY
    return len(one.values) == len(other.values) and all(
        abs(a - b) <= absolute + relative * abs(a) for a, b in zip(one.values, other.values, strict=True)
    )
