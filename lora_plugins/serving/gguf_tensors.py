"""The tensors of a LoRA file for llama.cpp, computed from PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper

from lora_plugins import missing_package
from lora_plugins.errors import ExportError, UnsupportedExport
from lora_plugins.models.wrapping import base_of, plain_path
from lora_plugins.plugins.traits import VARIANTS
from lora_plugins.serving.gguf_families import FAMILIES, Family
from lora_plugins.serving.source import MERGED, Source, is_base_copy

__all__ = ["Pair", "find_family", "load_gguf", "make_pairs"]

#: What PEFT calls the stacked experts of a block, and how llama.cpp splits them.
_EXPERTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Pair:
    """Both factors of one tensor's update, as llama.cpp stores them.

    Attributes:
        name: Name of the base's tensor, such as ``blk.0.attn_q.weight``.
        a: Shape ``[r, in]``; ``[experts, r, in]`` for stacked experts, ``[rows, r]`` for the input embedding.
        b: Shape ``[out, r]``; ``[experts, out, r]`` for stacked experts.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor


def find_family(source: Source) -> Family:
    """Return how llama.cpp stores the adapter's base.

    Raises:
        UnsupportedExport: Its type is not among those that are tested.
    """
    kind = source.base_config.model_type
    if kind not in FAMILIES:
        raise UnsupportedExport(
            f"{source.title} cannot be exported to GGUF: its base is of type {kind!r}, and how llama.cpp orders the "
            f"rows of its weights is known for {', '.join(sorted(FAMILIES))}. {MERGED}"
        )
    return FAMILIES[kind]


def make_pairs(source: Source, model: PeftModel, stored: Mapping[str, torch.Tensor], alpha: float) -> list[Pair]:
    """Return the factors of every adapted tensor, sorted by name.

    llama.cpp multiplies them by ``alpha / r``; where PEFT scales otherwise (rsLoRA, ``alpha_pattern``), the quotient is
    in ``b``.

    Args:
        source: The adapter.
        model: The result of `wrap_empty`.
        stored: The tensors of the adapter's file.
        alpha: What the file says in ``adapter.lora.alpha``.

    Raises:
        UnsupportedExport: llama.cpp has no place for one of them; the message names it.
    """
    _check_config(source)
    writer = _Converter(source, model, stored, alpha)
    pairs = [
        pair
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.scaling
        for pair in writer.convert(name, module)
    ]
    left = sorted(name for name in set(stored) - writer.used if not is_base_copy(source, name))
    if left:
        raise _refuse(source, f"the tensor {left[0]}", "it is not a LoRA factor of a layer")
    return sorted(pairs, key=lambda pair: pair.name)


def _check_config(source: Source) -> None:
    """Refuse settings that llama.cpp cannot compute."""
    config = source.job.config
    asked = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias != "none" and config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
    }
    for name, value in asked.items():
        if value:
            raise _refuse(
                source, f"{name}={value!r}", "a LoRA file for llama.cpp holds the factors of LoRA and no more"
            )
    for name in VARIANTS:
        if getattr(config, name, None):
            raise _refuse(source, name, "llama.cpp computes plain LoRA only")


def _refuse(source: Source, what: str, why: str) -> UnsupportedExport:
    return UnsupportedExport(f"{source.title} cannot be exported to GGUF with {what}: {why}. {MERGED}")


class _Converter:
    """Turns PEFT's layers into pairs; ``used`` collects the names of the tensors that were taken."""

    def __init__(self, source: Source, model: PeftModel, stored: Mapping[str, torch.Tensor], alpha: float) -> None:
        self.source = source
        self.config: Any = source.base_config
        self.family = find_family(source)
        self.stored = stored
        self.alpha = alpha
        self.used: set[str] = set()
        self.tied = _has_tied_head(base_of(model))
        self.names = _load_names(self.family.architecture, int(self.config.num_hidden_layers))

    def convert(self, name: str, module: LoraLayer) -> Iterator[Pair]:
        """Yield the pairs of one layer; ``name`` is its path in the wrapped model."""
        path = plain_path(name)
        if isinstance(module, ParamWrapper):
            yield from self._convert_experts(name, path, module)
        elif isinstance(module, Embedding):
            yield self._convert_embedding(name, path, module)
        else:
            a, b = self._take(name, "lora_A.weight"), self._take(name, "lora_B.weight")
            if a.ndim != 2:
                raise _refuse(self.source, f"an adapter on {path}", "it is a convolution")
            yield Pair(self._map(path), a, self._order(path, b) * self._factor(module, b.shape[-1]))

    def _convert_embedding(self, name: str, path: str, module: LoraLayer) -> Pair:
        if self.tied:
            # llama.cpp finds adapters by the tensor's name and would put the embedding's on the head.
            raise _refuse(
                self.source, f"an adapter on {path}", "the output head shares its weight, and one has the adapter only"
            )
        a, b = self._take(name, "lora_embedding_A"), self._take(name, "lora_embedding_B")
        return Pair(self._map(path), a.T, b * self._factor(module, b.shape[-1]))

    def _convert_experts(self, name: str, path: str, module: ParamWrapper) -> Iterator[Pair]:
        where = f"{path}.{module.parameter_name}"
        parts = _EXPERTS.get(module.parameter_name)
        if parts is None or not path.endswith(".experts") or getattr(module.get_base_layer(), "is_transposed", False):
            raise _refuse(self.source, f"an adapter on the parameter {where}", "how llama.cpp stores it is not known")
        count = module.num_experts
        a, b = self._take(name, "lora_A.weight"), self._take(name, "lora_B.weight")
        a = a.reshape(count, -1, a.shape[-1])
        # In PEFT's file the experts are the last dimension of B and the first of A.
        b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
        b = b * self._factor(module, b.shape[-1])
        for part, rows in zip(parts, b.chunk(len(parts), dim=1), strict=True):
            yield Pair(self._map(f"{path}.{part}"), a, rows)

    def _take(self, name: str, part: str) -> torch.Tensor:
        key = f"{name}.{part}"
        if key not in self.stored:
            raise _refuse(self.source, f"an adapter on {plain_path(name)}", f"its file has no {key}")
        self.used.add(key)
        return self.stored[key].float()

    def _order(self, path: str, b: torch.Tensor) -> torch.Tensor:
        order = self.family.orders.get(path.rpartition(".")[2])
        return b if order is None else b[order(self.config)]

    def _factor(self, module: LoraLayer, rank: int) -> float:
        """Return what PEFT's scale is of llama.cpp's ``alpha / r``: 1 for plain LoRA."""
        return float(module.scaling["default"]) / (self.alpha / rank)

    def _map(self, path: str) -> str:
        if path.rpartition(".")[2] == "lm_head" and (self.tied or not self.family.head):
            raise _refuse(
                self.source, f"an adapter on {path}", "the head shares the input embedding, and llama.cpp stores one"
            )
        # llama.cpp's scripts cut this prefix off where its table has none (BLOOM).
        found = self.names.get_name(path) or self.names.get_name(path.removeprefix("transformer."))
        if found is None:
            raise _refuse(self.source, f"an adapter on {path}", f"{self.family.architecture} has no tensor for it")
        return f"{found}.weight"


def _load_names(architecture: str, blocks: int) -> Any:
    """Return llama.cpp's table of names for an architecture, from the package gguf."""
    gguf = load_gguf()
    known = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UnsupportedExport(f"The installed gguf does not know {architecture!r}. Run `pip install -U gguf`.")
    return gguf.get_tensor_name_map(known[architecture], blocks)


def load_gguf() -> Any:
    """Import the package gguf, which only this export needs.

    Raises:
        ExportError: It is not installed.
    """
    missing = missing_package("gguf", "0.16")
    if missing:
        raise ExportError(f"Writing GGUF needs the package gguf: {missing}.")
    import gguf

    return gguf


def _has_tied_head(model: Any) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    first = model.get_input_embeddings()
    return bool(tied) or getattr(first, "weight", None) is getattr(head, "weight", head)
