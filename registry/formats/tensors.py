"""Tell what an adapter's tensors are by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import TensorRecord

__all__ = [
    "PREFIX",
    "TASK_HEADS",
    "LoraModule",
    "counted",
    "holds_vocabulary",
    "labels_of",
    "lora_modules",
    "may_be_trained",
    "other_tensors",
    "vocabulary_of",
]

_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<rest>\w+))?")
#: What PEFT puts before the name of every tensor in an adapter file.
PREFIX = "base_model.model."
#: Names of input embeddings and language model heads, whose rows are the entries of a vocabulary.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|lm_head|embed_out)\.")
#: Module names that suggest an embedding or a head, for unknown architectures too.
_END = re.compile(r"(^|\.)[^.]*(embed|wte|shared|head|decoder|vocab|output|proj_out)[^.]*(\.base_layer)?$")
#: Name parts of tensors that belong to a vocabulary.
_VOCABULARY = ("embed", "lm_head", "wte", "trainable_tokens", "shared")
#: The heads that PEFT saves for a classification task or question answering without their being named.
TASK_HEADS = ("classifier", "score", "qa_outputs")
#: Name part of the tensors of individually trained tokens.
_DELTA = "trainable_tokens_"


@dataclass
class LoraModule:
    """The names of a LoRA module's tensors: A, B and any others."""

    first: str | None = None
    second: str | None = None
    more: list[str] = field(default_factory=list)


def lora_modules(tensors: Mapping[str, TensorRecord]) -> dict[str, LoraModule]:
    """Return the LoRA modules of an adapter, by the name of the adapted module."""
    modules: dict[str, LoraModule] = {}
    for name in tensors:
        match = _LORA.fullmatch(name)
        if match is None:
            continue
        module = modules.setdefault(match["module"], LoraModule())
        if match["part"].endswith("_A") and match["rest"] in (None, "weight") and module.first is None:
            module.first = name
        elif match["part"].endswith("_B") and match["rest"] in (None, "weight") and module.second is None:
            module.second = name
        else:
            module.more.append(name)
    return modules


def other_tensors(tensors: Iterable[str]) -> list[str]:
    """Return the tensors that are not LoRA's: trained heads, embeddings, base biases, added tokens."""
    return [name for name in tensors if not _is_of_adapter(name)]


def _is_of_adapter(name: str) -> bool:
    """Whether a tensor is LoRA's own: its matrices, or what a variant such as KaSA or MonteCLoRA adds to them."""
    return name.startswith("lora_") or ".lora_" in name


def may_be_trained(name: str, record: TensorRecord, config: AdapterConfig) -> bool:
    """Whether a configuration trains a tensor, as far as its name and shape tell; embeddings and heads may be."""
    module, _, part = name.removeprefix(PREFIX).rpartition(".")
    if part == "bias" and config.fields.get("bias", "none") != "none":
        return True
    if _DELTA in name and config.fields.get("trainable_token_indices") is not None:
        return True
    saved = list(config.fields.get("modules_to_save") or ())
    # Early PEFT releases save a task's head without naming it in the configuration.
    saved += TASK_HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ()
    # PEFT matches suffixes: ``classifier`` also matches ``pre_classifier``. Submodules are saved along.
    parts = module.split(".")
    if any(".".join(parts[:count]).endswith(tuple(saved)) for count in range(1, len(parts) + 1)):
        return True
    return len(record.shape) == 2 and _END.search(module.replace(".token_adapter", "")) is not None


def counted(tensors: Mapping[str, TensorRecord]) -> Iterator[tuple[str, int, int]]:
    """Yield module kind, number of tensors and number of parameters, for the card."""
    table: dict[str, list[int]] = {}
    for name, record in tensors.items():
        match = _LORA.fullmatch(name)
        module = (match["module"] if match else name.rpartition(".")[0]).removeprefix(PREFIX).replace(".base_layer", "")
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", "", module).rpartition(".")[2] or module
        table.setdefault(kind, []).append(prod(record.shape))
    for kind in sorted(table):
        yield kind, len(table[kind]), sum(table[kind])


def labels_of(tensors: Mapping[str, TensorRecord], config: AdapterConfig) -> int | None:
    """Return the number of labels of a classifier's saved head; ``None`` for other tasks.

    A head may have several layers. Its last layer is the one whose rows are not another layer's columns.
    """
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [tensors[name].shape for name in other_tensors(tensors) if not _is_vocabulary(name)]
    layers = [shape for shape in heads if len(shape) == 2]
    last = {rows for rows, _ in layers if not any(columns == rows for _, columns in layers)}
    # The number of labels equals the width of the head.
    last = last or {rows for rows, _ in layers}
    return last.pop() if len(last) == 1 else None


def vocabulary_of(tensors: Mapping[str, TensorRecord]) -> int | None:
    """Return the vocabulary size according to the rows of saved and adapted embeddings and heads."""
    rows = set()
    for name, record in tensors.items():
        if name.endswith(".lora_embedding_A"):
            rows.add(record.shape[-1])
        elif len(record.shape) == 2 and _EMBEDDING.search(name) and "lora_" not in name and _DELTA not in name:
            rows.add(record.shape[0])
    return max(rows, default=None)


def holds_vocabulary(tensors: Iterable[str]) -> bool:
    """Whether tensors belong to the vocabulary, so that the tokenizer belongs to the adapter."""
    return any(part in name for name in other_tensors(tensors) for part in _VOCABULARY)


def _is_vocabulary(name: str) -> bool:
    return _EMBEDDING.search(name) is not None or _DELTA in name
