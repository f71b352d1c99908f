"""Find newly initialized parameters: those that no checkpoint provided."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from lora_plugins.models.checkpoint import Checkpoint, find_checkpoint, find_pretrained
from lora_plugins.models.wrapping import plain_path

__all__ = ["Grown", "Initialized", "find_initialized", "find_untrained", "is_in", "set_new_tokens"]


#: Attribute that transformers 5.23 sets on parameters from a checkpoint only.
_MARK = "_is_hf_initialized"

#: Attribute of the base model that keeps the result: quantized layers and saved heads lose the marks.
_KEPT = "lora_plugins_initialized"

#: Attribute of the base model with the ids of tokens that its own tokenizer does not have.
_NEW_TOKENS = "lora_plugins_new_tokens"


@dataclass(frozen=True)
class Grown:
    """An embedding, or an output head, with rows for new tokens.

    Attributes:
        path: Path of the module in the base model.
        before: Rows in the checkpoint.
        now: Rows in the model.
        spare: New tokens in rows that the checkpoint has and its own tokens do not use, by row.
    """

    path: str
    before: int
    now: int
    spare: Mapping[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """The new rows, in order."""
        return [*self.spare, *range(self.before, self.now)]


@dataclass(frozen=True)
class Initialized:
    """The newly initialized parameters of a model, and the evidence.

    Attributes:
        evidence: ``"marks"`` (set by transformers), ``"checkpoint"`` (its headers), ``"structure"`` (neither is
            available: only the task's head is assumed to be new).
        parameters: Paths of the new parameters in the base model.
        grown: Embeddings with new rows.
        rows_known: Whether the checkpoint's rows could be read.
        rows: Rows of the embeddings now, by path.
    """

    evidence: str
    parameters: tuple[str, ...] = ()
    grown: tuple[Grown, ...] = ()
    rows_known: bool = False
    rows: dict[str, int] = field(default_factory=dict)

    def note(self) -> str:
        """Return a clause for the report on how new parameters were recognised."""
        if self.evidence == "structure":
            return (
                "the model has neither transformers' marks of loaded weights nor a checkpoint at hand: the head was "
                "found by the model's structure, and whether anything else is newly initialized is not known"
            )
        source = "transformers' marks" if self.evidence == "marks" else "the checkpoint's headers"
        rows = "" if self.rows_known else "; whether the vocabulary has grown is not known: no checkpoint is at hand"
        return f"newly initialized weights were found by {source}{rows}"


def find_initialized(model: nn.Module, heads: Iterable[str] = ()) -> Initialized:
    """Find the newly initialized parameters of a model.

    Evidence, in this order: transformers' marks, which count only if some parameter carries one; the headers of
    the checkpoint that the model names, where it is on this machine and the model holds its values; the structure.

    Args:
        model: The base model, which may be quantized, on the meta device, or under adapters of PEFT.
        heads: Paths of the task's heads; they are assumed to be new where there is no other evidence.
    """
    kept: Initialized | None = getattr(model, _KEPT, None)
    parameters = {plain_path(name): value for name, value in model.named_parameters() if not _is_adapter(name)}
    pretrained = find_pretrained(model)
    checkpoint = find_checkpoint(pretrained[1]) if pretrained is not None else None
    if kept is not None:
        evidence, new = kept.evidence, kept.parameters
    else:
        evidence, new = _find_new(model, parameters, pretrained, checkpoint, heads)
    shapes = _find_embeddings(model, pretrained)
    before = _read_rows_before(shapes, checkpoint if evidence != "structure" else None)
    first = next((path for path, rows in before.items() if rows is not None), None)
    then = {
        path: before[first] if first and f"{path}.weight" not in new and _is_twin(path, rows, first, shapes) else rows
        for path, rows in before.items()
    }
    tokens: dict[int, str] = getattr(model, _NEW_TOKENS, {})
    grown = [_compare_rows(path, rows, shapes[path][0], tokens) for path, rows in then.items()]
    # A resized embedding is a new tensor, but only its rows beyond those in the files are new.
    resized = [path for path, rows in before.items() if rows is not None]
    found = Initialized(
        evidence,
        tuple(name for name in new if not is_in(name, resized)),
        tuple(item for item in grown if item.rows),
        rows_known=first is not None,
        rows={path: shape[0] for path, shape in shapes.items()},
    )
    if kept is None and evidence != "structure":
        setattr(model, _KEPT, found)
    return found


def set_new_tokens(model: nn.Module, tokens: Mapping[int, str]) -> None:
    """Tell a base model which tokens its own tokenizer does not have, by id, for `find_initialized`.

    A vocabulary is often padded: such tokens may fit into its spare rows, which no shape shows.
    """
    setattr(model, _NEW_TOKENS, dict(sorted(tokens.items())))


def _compare_rows(path: str, before: int | None, now: int, tokens: Mapping[int, str]) -> Grown:
    known = min(before or now, now)
    return Grown(path, known, now, {row: token for row, token in tokens.items() if row < known})


def _is_twin(path: str, before: int | None, other: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an end that is not in the files had as many rows as the other one, as a tied head has.

    Some classes make more rows for one of them (Molmo 2: 128 for the input).
    """
    return before is None and shapes[path][0] == shapes[other][0]


def _read_rows_before(shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint | None) -> dict[str, int | None]:
    return {path: checkpoint.rows(f"{path}.weight", shape) if checkpoint else None for path, shape in shapes.items()}


def is_in(name: str, paths: Iterable[str]) -> bool:
    """Whether a parameter or module lies in, or is, one of the modules at these paths."""
    return any(name == path or name.startswith(path + ".") for path in paths)


def _is_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_"))


def _find_new(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    pretrained: tuple[str, PreTrainedModel] | None,
    checkpoint: Checkpoint | None,
    heads: Iterable[str],
) -> tuple[str, tuple[str, ...]]:
    own = {name: value for name, value in parameters.items() if _can_be_new(value)}
    # Under FSDP, transformers 5.23 marks everything in processes that get their weights from the first one.
    marked = not is_fsdp_enabled() and any(getattr(value, _MARK, False) for value in parameters.values())
    if marked:
        unmarked = [name for name, value in own.items() if not getattr(value, _MARK, False)]
        ignored = _find_ignored(pretrained)
        new = [name for name in unmarked if not (ignored and ignored.search(name))]
        if checkpoint is not None:
            # A weight that was replaced by a copy of itself lost its mark.
            new = [name for name in new if not checkpoint.holds(name, own[name])]
        return "marks", tuple(new)
    if pretrained is not None and checkpoint is not None and checkpoint.is_source_of(pretrained[1]):
        missing = _ask_transformers(pretrained[1], checkpoint)
        if missing is not None:
            prefix = f"{pretrained[0]}." if pretrained[0] else ""
            inside = {prefix + name for name in missing}
            new = [n for n in own if n in inside or (prefix and not n.startswith(prefix))]
            return "checkpoint", tuple(new)
    return "structure", tuple(name for name in own if is_in(name, list(heads)))


def _can_be_new(value: torch.Tensor) -> bool:
    # Tensor subclasses belong to quantizers, which make them from loaded weights.
    plain = type(value) is nn.Parameter and type(value.data) is torch.Tensor
    return value.is_floating_point() and (plain or hasattr(value, "ds_id"))


def _find_ignored(pretrained: tuple[str, PreTrainedModel] | None) -> re.Pattern[str] | None:
    """Return a pattern for names that transformers computes instead of loading."""
    patterns = getattr(pretrained[1], "_keys_to_ignore_on_load_missing", None) if pretrained is not None else None
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _find_embeddings(model: nn.Module, pretrained: tuple[str, PreTrainedModel] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the input embedding and of an output head that does not share its weight, by path."""
    if pretrained is None:
        return {}
    found: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for getter in (pretrained[1].get_input_embeddings, pretrained[1].get_output_embeddings):
        try:
            module: Any = getter()
        except (NotImplementedError, AttributeError):
            continue
        module = _unwrap(module)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or id(weight) in seen:
            continue
        shape = tuple(getattr(weight, "ds_shape", None) or weight.shape)
        if len(shape) != 2:
            continue
        if not seen and not isinstance(module, nn.Embedding):
            # Not a vocabulary: the patches of an image model, the frames of a speech model.
            return {}
        seen.add(id(weight))
        path = next((path for path, part in model.named_modules() if part is module), None)
        if path is not None:
            found[plain_path(path)] = shape
    return found


def _unwrap(module: Any) -> Any:
    """Return the layer inside PEFT's wrappers."""
    for name in ("original_module", "token_adapter", "base_layer"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _unwrap(inner)
    return module


def _ask_transformers(model: PreTrainedModel, checkpoint: Checkpoint) -> set[str] | None:
    """Return the parameters that the checkpoint would not provide to a model of this class, renamings included.

    The class loads the headers onto the meta device: no weights are read or initialized. ``None`` if that fails.
    """
    empty = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
    try:
        with _silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, info = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=empty,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception:
        # A custom class may take other arguments, or raise anything.
        return None
    return {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


@contextmanager
def _silence() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def find_untrained(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Return the given parameters of the base model that training would neither change nor save.

    Args:
        model: The base model of the model in the Trainer.
        parameters: Paths in the base model; for an embedding with new rows, that of its weight.
    """
    trained = {_find_trained_path(name) for name, value in model.named_parameters() if value.requires_grad}
    return [name for name in parameters if name not in trained]


def _find_trained_path(name: str) -> str:
    """Return the path of the base model's parameter that a trained one replaces or updates."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name.replace("_orig_mod.", ""))
    # New rows, and the low-rank update that comes with a saved embedding, stand for the embedding's weight.
    name = re.sub(r"\.token_adapter\.trainable_tokens_delta\..+", ".weight", name)
    adapted = name.partition(".lora_")[0]
    return plain_path(f"{adapted}.weight" if adapted.rpartition(".")[2] in EMBEDDING_LAYER_NAMES else name)
