"""Check names, shapes and values of an adapter's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from registry.errors import InvalidAdapter
from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import TensorRecord
from registry.formats.weights import Header, check_values, read_file_header

__all__ = [
    "CheckedWeights",
    "LoraModule",
    "check_adapter",
    "check_trained",
    "check_weights",
    "counted",
    "labels_of",
    "lora_modules",
    "other_tensors",
    "vocabulary_of",
]

_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<rest>\w+))?")
_PREFIX = "base_model.model."
#: Names of input embeddings and language model heads, whose rows are the entries of a vocabulary.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|lm_head|embed_out)\.")
#: Module names that suggest an embedding or a head, for unknown architectures too.
_END = re.compile(r"(^|\.)[^.]*(embed|wte|shared|head|decoder|vocab|output|proj_out)[^.]*(\.base_layer)?$")
_TASK_HEADS = ("classifier", "score", "qa_outputs")
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
    return any(part.startswith("lora_") for part in name.split("."))


def check_adapter(tensors: Mapping[str, TensorRecord], config: AdapterConfig) -> None:
    """Check that the tensors form a LoRA adapter of the configured rank.

    Raises:
        InvalidAdapter: There are none, an A or B is missing, or shapes or ranks do not match.
    """
    modules = lora_modules(tensors)
    if not modules:
        raise InvalidAdapter("The adapter is empty: its file holds no LoRA tensors. Was it saved before any were made?")
    compiled = [name for name in tensors if "_orig_mod." in name]
    if compiled:
        raise InvalidAdapter(
            f"{len(compiled)} tensors have names with _orig_mod., first {compiled[0]}: the adapter was saved from a "
            "compiled model, and nothing could load it. Save it from the model itself (model._orig_mod)."
        )
    strange = [name for name in tensors if not name.startswith(_PREFIX)]
    if strange:
        raise InvalidAdapter(
            f"{len(strange)} tensors have names that do not begin with {_PREFIX}, first {strange[0]}: this is not what "
            "PEFT's save_pretrained writes. Save it with that."
        )
    _check_others(tensors, config)
    for name, module in modules.items():
        _check_module(name, module, tensors, config)


def _check_others(tensors: Mapping[str, TensorRecord], config: AdapterConfig) -> None:
    """Refuse base weights that the configuration does not train: loading the adapter would replace them.

    Whether an embedding or a head was trained or resized is checked later against the base, by `check`.

    Raises:
        InvalidAdapter: The file holds such weights.
    """
    foreign = [name for name in other_tensors(tensors) if not _may_be_trained(name, tensors[name], config)]
    if foreign:
        raise InvalidAdapter(
            f"{len(foreign)} tensors, first {foreign[0]}, are weights of the base model that adapter_config.json does "
            "not train; loading the adapter would replace them. If they were trained, name their modules in "
            "modules_to_save; else leave them out"
        )


def _may_be_trained(name: str, record: TensorRecord, config: AdapterConfig) -> bool:
    module, _, part = name.removeprefix(_PREFIX).rpartition(".")
    if part == "bias" and config.fields.get("bias", "none") != "none":
        return True
    if _DELTA in name and config.fields.get("trainable_token_indices") is not None:
        return True
    saved = list(config.fields.get("modules_to_save") or ())
    # Early PEFT releases save a task's head without naming it in the configuration.
    saved += _TASK_HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ()
    # PEFT matches suffixes: ``classifier`` also matches ``pre_classifier``. Submodules are saved along.
    parts = module.split(".")
    if any(".".join(parts[:count]).endswith(tuple(saved)) for count in range(1, len(parts) + 1)):
        return True
    return _is_of_adapter(name) or (
        len(record.shape) == 2 and _END.search(module.replace(".token_adapter", "")) is not None
    )


def _check_module(name: str, module: LoraModule, tensors: Mapping[str, TensorRecord], config: AdapterConfig) -> None:
    if module.first is None or module.second is None:
        half, other = ("B", "A") if module.first is None else ("A", "B")
        raise InvalidAdapter(f"{name} has a LoRA {half} and no {other}: half of it was not saved")
    twice = [other for other in module.more if re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", other)]
    if twice or ("_embedding_" in module.first) != ("_embedding_" in module.second):
        raise InvalidAdapter(
            f"{name} has more than one LoRA A or B: {module.first}, {module.second}, {', '.join(twice)}"
        )
    first, second = tensors[module.first].shape, tensors[module.second].shape
    if len(first) < 2 or len(first) != len(second) or 0 in first + second:
        raise InvalidAdapter(
            f"{name} has a LoRA A of shape {first} and B of shape {second}. Tensors without rows were not gathered "
            "from all processes before they were saved: save under ZeRO-3 or FSDP with the Trainer's save_model."
        )
    # Block-diagonal LoRA stores the blocks of a B on top of each other.
    if first[0] not in (second[1], second[1] * config.blocks):
        raise InvalidAdapter(f"{name} has a LoRA A of rank {first[0]} and a B of rank {second[1]}")
    # Adapters of expert parameters stack the ranks of all experts.
    experts = bool(config.fields.get("target_parameters"))
    if first[0] not in config.ranks and not (experts and any(first[0] % rank == 0 for rank in config.ranks)):
        known = ", ".join(str(rank) for rank in sorted(config.ranks))
        raise InvalidAdapter(
            f"{name} has rank {first[0]}, and adapter_config.json says {known}: they do not belong together"
        )


def check_trained(tensors: Mapping[str, TensorRecord], zeros: set[str]) -> None:
    """Check that the adapter has an effect: a module with a zero A or B computes the same as the base.

    Raises:
        InvalidAdapter: The adapter has no effect.
    """
    reason = _find_untrained(tensors, zeros)
    if reason is not None:
        raise InvalidAdapter(reason)


def _find_untrained(tensors: Mapping[str, TensorRecord], zeros: set[str]) -> str | None:
    modules = lora_modules(tensors)
    if set(other_tensors(tensors)) - zeros or any(not {m.first, m.second} & zeros for m in modules.values()):
        return None
    return (
        f"All {len(modules)} LoRA modules are zero (A or B): the adapter changes nothing. It was never trained, or "
        "gradients did not reach it. Train it again, or use another version."
    )


@dataclass(frozen=True)
class CheckedWeights:
    """Weights of which every value was checked.

    Attributes:
        header: Header of the file.
        warnings: Harmless but useless content, with the remedy: an adapter of zeros, float64. A push refuses it, a
            pull warns.
    """

    header: Header
    warnings: tuple[str, ...] = ()


def check_weights(path: Path, config: AdapterConfig) -> CheckedWeights:
    """Check an adapter's weight file: header, names, shapes, ranks and every value.

    Push, pull, `verify` and adapter folders share this check. It reads all values once, 16 MB at a time.

    Args:
        path: ``adapter_model.safetensors``.
        config: The configuration beside it.

    Raises:
        UnsafeFile: It is not a safetensors file, or a malicious one.
        InvalidAdapter: An A or B is missing, a shape or rank does not match the configuration, a dtype is not
            floating-point, or values are not finite or exceed float16's maximum.
    """
    header = read_file_header(path)
    check_adapter(header.tensors, config)
    zeros = check_values(path, header, double=True)
    double = [name for name, record in header.tensors.items() if record.dtype == "F64"]
    found = [_find_untrained(header.tensors, zeros)]
    if double:
        found.append(
            f"{len(double)} tensors, first {double[0]}, have dtype F64, which takes twice the memory of F32 and adds "
            "nothing. Convert the adapter, for example with model.float(), and save it again."
        )
    return CheckedWeights(header, tuple(reason for reason in found if reason is not None))


def counted(tensors: Mapping[str, TensorRecord]) -> Iterator[tuple[str, int, int]]:
    """Yield module kind, number of tensors and number of parameters, for the card."""
    table: dict[str, list[int]] = {}
    for name, record in tensors.items():
        match = _LORA.fullmatch(name)
        module = (
            (match["module"] if match else name.rpartition(".")[0]).removeprefix(_PREFIX).replace(".base_layer", "")
        )
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


def _is_vocabulary(name: str) -> bool:
    return _EMBEDDING.search(name) is not None or _DELTA in name
