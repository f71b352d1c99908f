"""Checks of tensors: pairs, shapes, ranks, and what is not LoRA's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import Changes, Check, Finding
from registry.errors import InvalidAdapter, TooLarge, UnsafeFile
from registry.formats.adapter_config import AdapterConfig
from registry.formats.paths import ADAPTER_WEIGHTS
from registry.formats.records import TensorRecord
from registry.formats.tensors import (
    PREFIX,
    TASK_HEADS,
    LoraModule,
    lora_modules,
    may_be_trained,
    other_tensors,
)
from registry.formats.weights import describe_dtype

__all__ = ["CHECKS", "LARGE", "describe_large"]

#: Maximum total bytes of tensors other than LoRA's, except those allowed by name.
LARGE = 32 * 1024 * 1024
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_MATRIX = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")
_END = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|lm_head|embed_out)$")


def _find_unreadable(files: AdapterFiles) -> Iterator[str]:
    try:
        _ = files.header
    except UnsafeFile as reason:
        yield str(reason)


def _find_empty_tensors(files: AdapterFiles) -> Iterator[str]:
    empty = [name for name, record in files.tensors.items() if 0 in record.shape]
    if empty:
        yield (
            f"{len(empty)} tensors have no values, first {empty[0]} of shape {files.tensors[empty[0]].shape}: they "
            "were not gathered from all processes before they were saved"
        )


def _find_nothing(files: AdapterFiles) -> Iterator[str]:
    if not lora_modules(files.tensors):
        yield "The adapter is empty: its file holds no LoRA tensors. Was it saved before any were made?"


def _find_base_weights(files: AdapterFiles) -> Iterator[Finding]:
    """Find base weights that the configuration does not train: loading the adapter would replace them.

    Whether an embedding or a head was trained or resized is checked against the base.
    """
    tensors, config = files.tensors, files.config
    foreign = [name for name in other_tensors(tensors) if not may_be_trained(name, tensors[name], config)]
    if foreign:
        yield Finding(
            f"{len(foreign)} tensors, first {foreign[0]}, are weights of the base model that adapter_config.json does "
            "not train; loading the adapter would replace them. If they were trained, name their modules in "
            "modules_to_save; else leave them out",
            "--fix leaves them out",
            Changes(drop=tuple(foreign)),
        )


def _list_complete(files: AdapterFiles) -> Iterator[tuple[str, str, str]]:
    """Yield module, A and B of the modules that have both."""
    for name, module in lora_modules(files.tensors).items():
        if module.first is not None and module.second is not None:
            yield name, module.first, module.second


def _find_halves(files: AdapterFiles) -> Iterator[str]:
    for name, module in lora_modules(files.tensors).items():
        if module.first is None or module.second is None:
            half, other = ("B", "A") if module.first is None else ("A", "B")
            yield f"{name} has a LoRA {half} and no {other}: half of it was not saved"


def _find_twice(files: AdapterFiles) -> Iterator[str]:
    modules = lora_modules(files.tensors)
    for name, first, second in _list_complete(files):
        twice = [other for other in modules[name].more if _MATRIX.search(other)]
        if twice or ("_embedding_" in first) != ("_embedding_" in second):
            yield f"{name} has more than one LoRA A or B: {first}, {second}, {', '.join(twice)}"


def _find_shapes(files: AdapterFiles) -> Iterator[str]:
    for name, one, other in _list_complete(files):
        first, second = files.tensors[one].shape, files.tensors[other].shape
        if len(first) < 2 or len(first) != len(second) or 0 in first + second:
            yield (
                f"{name} has a LoRA A of shape {first} and B of shape {second}. Tensors without rows were not gathered "
                "from all processes before they were saved: save under ZeRO-3 or FSDP with the Trainer's save_model."
            )


def _list_shaped(files: AdapterFiles) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield module and shapes of A and B, where the shapes can be a pair's."""
    for name, one, other in _list_complete(files):
        first, second = files.tensors[one].shape, files.tensors[other].shape
        if len(first) >= 2 and len(first) == len(second) and 0 not in first + second:
            yield name, first, second


def _find_uneven(files: AdapterFiles) -> Iterator[str]:
    for name, first, second in _list_shaped(files):
        # Block-diagonal LoRA stores the blocks of a B on top of each other.
        if first[0] not in (second[1], second[1] * files.config.blocks):
            yield f"{name} has a LoRA A of rank {first[0]} and a B of rank {second[1]}"


def _find_other_rank(files: AdapterFiles) -> Iterator[str]:
    config = files.config
    # Adapters of expert parameters stack the ranks of all experts.
    experts = bool(config.fields.get("target_parameters"))
    for name, first, _ in _list_shaped(files):
        if first[0] not in config.ranks and not (experts and any(first[0] % rank == 0 for rank in config.ranks)):
            known = ", ".join(str(rank) for rank in sorted(config.ranks))
            yield f"{name} has rank {first[0]}, and adapter_config.json says {known}: they do not belong together"


def _find_other_dtypes(files: AdapterFiles) -> Iterator[str]:
    for name, record in files.tensors.items():
        reason = describe_dtype(name, record)
        if reason is not None:
            yield reason


def _find_not_finite(files: AdapterFiles) -> Iterator[str]:
    yield from files.values.problems.values()


def _find_untrained(files: AdapterFiles) -> Iterator[str]:
    modules, zeros = lora_modules(files.tensors), files.values.zeros
    if set(other_tensors(files.tensors)) - zeros or not all(_is_zero(module, zeros) for module in modules.values()):
        return
    yield (
        f"All {len(modules)} LoRA modules are zero (A or B): the adapter changes nothing. It was never trained, or "
        "gradients did not reach it. Train it again, or use another version."
    )


def _is_zero(module: LoraModule, zeros: frozenset[str]) -> bool:
    return bool({module.first, module.second} & zeros)


def _find_zero_modules(files: AdapterFiles) -> Iterator[str]:
    modules, zeros = lora_modules(files.tensors), files.values.zeros
    empty = [name for name, module in modules.items() if _is_zero(module, zeros)]
    if empty and len(empty) < len(modules):
        yield f"{len(empty)} of {len(modules)} LoRA modules are zero (A or B), first {empty[0]}: they change nothing"


def _find_double(files: AdapterFiles) -> Iterator[Finding]:
    double = [name for name, record in files.tensors.items() if record.dtype == "F64"]
    if double:
        yield Finding(
            f"{len(double)} tensors, first {double[0]}, have dtype F64, which takes twice the memory of F32 and adds "
            "nothing. Convert the adapter, for example with model.float(), and save it again.",
            "Convert them to F32",
            Changes(single=tuple(double)),
        )


def _find_large(files: AdapterFiles) -> Iterator[str]:
    tensors = files.tensors
    sizes = {name: prod(tensors[name].shape) * _BYTES.get(tensors[name].dtype, 8) for name in other_tensors(tensors)}
    total = max((end for _, end in files.header.offsets.values()), default=0)
    reason = describe_large(sizes, files.allow, total)
    if reason is not None:
        yield reason


def describe_large(sizes: Mapping[str, int], allow: Sequence[str], total: int) -> str | None:
    """Return why tensors other than LoRA's are too large for a release; ``None`` if they are not.

    Args:
        sizes: Bytes of these tensors, by name.
        allow: Names of modules whose tensors may be large.
        total: Bytes of all tensors.
    """
    refused = {name: size for name, size in sizes.items() if not any(f".{part}." in f".{name}" for part in allow)}
    if sum(refused.values()) <= LARGE:
        return None
    largest = sorted(refused, key=lambda name: -refused[name])[:5]
    listed = ", ".join(f"{name} ({refused[name] / 1e6:,.1f} MB)" for name in largest)
    modules = sorted({name.split(".")[-2] for name in largest})
    return (
        f"{sum(refused.values()) / 1e6:,.1f} of {total / 1e6:,.1f} MB are tensors that are not LoRA's: {listed}. "
        f"If they were trained and have to be published, say so: push_adapter(…, allow={modules!r})"
    )


def _find_embeddings(files: AdapterFiles) -> Iterator[str]:
    """Find whole embeddings and heads that the configuration neither trains nor adapts."""
    if files.base is not None:
        # The check against the base knows whether they are copies of its own.
        return
    tensors = files.tensors
    whole = [name for name in other_tensors(tensors) if _is_untrained_end(name, tensors[name], files.config)]
    if whole:
        size = sum(prod(tensors[name].shape) * _BYTES.get(tensors[name].dtype, 8) for name in whole)
        yield (
            f"{len(whole)} tensors, first {whole[0]}, are whole embeddings or heads ({size / 1e6:,.1f} MB) that "
            "adapter_config.json does not train. PEFT saves them if tokens were added, or save_embedding_layers=True"
        )


def _is_untrained_end(name: str, record: TensorRecord, config: AdapterConfig) -> bool:
    module, _, part = name.removeprefix(PREFIX).rpartition(".")
    inner = module.removesuffix(".base_layer")
    if part != "weight" or len(record.shape) != 2 or _END.search(inner) is None:
        return False
    targets = config.fields.get("target_modules") or ()
    adapted = inner.endswith(tuple(targets)) if not isinstance(targets, str) else inner != module
    return not adapted and not _is_named(inner, config)


def _is_named(module: str, config: AdapterConfig) -> bool:
    return module.endswith(tuple(config.fields.get("modules_to_save") or ("\n",)))


def _find_missing(files: AdapterFiles) -> Iterator[str]:
    """Find what the configuration promises and the file does not hold; PEFT makes it anew, at random."""
    names, config = list(files.tensors), files.config
    if config.fields.get("use_dora") and not any("lora_magnitude_vector" in name for name in names):
        yield "use_dora is true, and the file holds no magnitudes (lora_magnitude_vector)"
    if config.fields.get("trainable_token_indices") and not any("trainable_tokens_" in name for name in names):
        yield "trainable_token_indices names tokens, and the file does not hold their rows (trainable_tokens_delta)"
    saved = [name for name in config.fields.get("modules_to_save") or () if isinstance(name, str)]
    lost = [name for name in saved if not any(_holds(tensor, name) for tensor in other_tensors(names))]
    # PEFT names the usual heads of a task, of which a model has one.
    if lost and not (set(lost) <= set(TASK_HEADS) and len(lost) < len(saved)):
        them = "it" if len(lost) == 1 else "them"
        yield f"modules_to_save names {', '.join(lost)}, and the file holds no tensor of {them}"


def _holds(tensor: str, module: str) -> bool:
    """Whether a tensor is a part of a module named by the end of its path."""
    parts = tensor.removeprefix(PREFIX).split(".")
    return any(".".join(parts[:count]).endswith(module) for count in range(1, len(parts)))


def _find_unused_targets(files: AdapterFiles) -> Iterator[str]:
    targets = files.config.fields.get("target_modules")
    if not isinstance(targets, list):
        return
    modules = [f".{name}" for name in lora_modules(files.tensors)]
    # PEFT writes trained tokens, too, for a target of that name.
    unused = [name for name in targets if not any(module.endswith(f".{name}") for module in modules)]
    if unused and modules:
        named = ", ".join(repr(name) for name in unused[:5])
        yield f"target_modules names {named}, and the file holds no LoRA of {'it' if len(unused) == 1 else 'them'}"


_SAVE = "Save it again from the trained model; what is not in the file cannot be restored"

CHECKS = (
    Check(
        "weights", "error", ("files",), _find_unreadable, "Save or download the file again",
        refused=dict.fromkeys(("folder", "push", "pull", "load"), UnsafeFile),
    ),
    Check("empty-tensors", "error", ("header",), _find_empty_tensors,
          "Save under ZeRO-3 or FSDP with the Trainer's save_model"),
    Check("no-lora", "error", ("header",), _find_nothing, refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check(
        "base-weights", "error", ("configuration", "header"), _find_base_weights,
        refused={"push": InvalidAdapter, "pull": InvalidAdapter},
    ),
    Check("half-module", "error", ("header",), _find_halves, _SAVE,
          refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check("double-module", "error", ("header",), _find_twice, "Keep the one that was trained",
          refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check("shape", "error", ("header",), _find_shapes, refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check("uneven-rank", "error", ("configuration", "header"), _find_uneven, _SAVE,
          refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check("other-rank", "error", ("configuration", "header"), _find_other_rank,
          "Put the configuration of the same training beside it",
          refused={"push": InvalidAdapter, "pull": InvalidAdapter}),
    Check("dtype", "error", ("header",), _find_other_dtypes,
          refused=dict.fromkeys(("push", "pull", "load"), InvalidAdapter)),
    Check("not-finite", "error", ("header", "values"), _find_not_finite, "Use an earlier checkpoint",
          refused=dict.fromkeys(("push", "pull", "load"), InvalidAdapter)),
    Check("untrained", "error", ("header", "values"), _find_untrained,
          refused={"push": InvalidAdapter}, warned=("pull",)),
    Check("zero-modules", "warning", ("header", "values"), _find_zero_modules,
          "Gradients did not reach them in training: see whether target_modules are what was meant"),
    Check("double-precision", "warning", ("header",), _find_double,
          refused={"push": InvalidAdapter}, warned=("pull",)),
    Check("large-tensors", "warning", ("header",), _find_large, refused={"push": TooLarge}),
    Check("whole-embeddings", "warning", ("configuration", "header"), _find_embeddings,
          "If no tokens were added, save with save_embedding_layers=False. doctor --base tells whether they are copies "
          "of the base's, and --fix leaves those out"),
    Check("missing-tensors", "error", ("configuration", "header"), _find_missing, _SAVE),
    Check("unused-targets", "warning", ("configuration", "header"), _find_unused_targets,
          f"Compare with the names in {ADAPTER_WEIGHTS}; a name that matches nothing was skipped in training"),
)  # fmt: skip
