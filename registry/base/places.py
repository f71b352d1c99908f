"""Match an adapter's tensors with the places for them in a base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.base.fingerprint import original_name
from registry.formats.patterns import PatternTable
from registry.formats.records import TensorRecord
from registry.formats.tensors import PREFIX

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Placement", "adapter_shapes", "ends_of", "place_tensors", "shorten_tables"]

Shapes = Mapping[str, tuple[int, ...]]
#: Keys of a table that PEFT compares quickly.
_FEW_KEYS = 64
_TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Placement:
    """Result of matching the tensors of an adapter.

    Attributes:
        problems: Clauses about tensors without a place, places without a tensor, and shapes that differ.
        copies: Tensors that hold an embedding or head of the base, with that parameter's names in the base: its own
            first, then those of tied modules, as a file holds a tied weight once.
        left_out: Weights of embedding and head that the adapter's file does not hold as a whole.
        rename: Prefix of tensor names and what to rename it to, so that all tensors find their place; ``None`` if no
            such change helps.
    """

    problems: list[str] = field(default_factory=list)
    copies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    rename: tuple[str, str] | None = None


def place_tensors(stored: Mapping[str, TensorRecord], config: Any, base: nn.Module) -> Placement:
    """Compare an adapter's tensors with those that PEFT creates for its configuration on this base.

    Args:
        stored: The adapter's tensors, by name.
        config: A ``peft.LoraConfig``.
        base: The base on the meta device; PEFT modifies it.
    """
    given = {name: record.shape for name, record in stored.items()}
    ends = _find_end_parameters(base)
    try:
        wrapped, expected = _wrap(base, config)
    except Exception as error:
        # PEFT, torch and transformers may raise anything for an untrusted configuration.
        return Placement([f"PEFT cannot put it into this model ({_shorten_error(error)})"])
    given = {name: shape for name, shape in given.items() if not _is_made_later(name, expected, config)}
    found = _compare(given, expected, ends)
    if found.problems:
        renamed = _rename_as_peft(given, wrapped, config)
        again = _compare(renamed, expected, ends) if renamed != given else found
        found = found if again.problems else again
    there = {original_name(name) for name in given} | {names[0] for names in found.copies.values()}
    held = {id(ends[name]) for name in there if name in ends}
    found.left_out = [name for name, end in ends.items() if name.endswith("weight") and id(end) not in held]
    return found


def _compare(given: Shapes, expected: Shapes, ends: Mapping[str, nn.Parameter]) -> Placement:
    found = Placement()
    extra = []
    for name in sorted(set(given) - set(expected)):
        # PEFT 0.21.2 writes trained embeddings of a grown vocabulary twice, and reads the other copy.
        if given[name] == expected.get(name.replace(".modules_to_save.", ".")):
            continue
        if _is_tied_twin(name, given[name], expected, ends):
            continue
        inner = original_name(name)
        if "lora_" not in name and inner in ends and given[name][1:] == tuple(ends[inner].shape[1:]):
            found.copies[name] = (inner, *(other for other in ends if other != inner and ends[other] is ends[inner]))
        else:
            extra.append(name)
    missing = sorted(set(expected) - set(given))
    shapes = [name for name in sorted(given) if name in expected and given[name] != expected[name]]
    if extra:
        found.problems.append(_list_first(extra, f"of {len(given)} tensors have no place in it"))
    if missing:
        found.problems.append(_list_first(missing, f"of its {len(expected)} places get no tensor"))
    if shapes:
        told = [f"{name} is {given[name]}, has to be {expected[name]} here" for name in shapes]
        found.problems.append(_list_first(told, "tensors have another shape"))
    found.rename = _find_rename(extra, missing, given, expected)
    if found.rename is not None:
        old, new = found.rename
        found.problems.append(
            f"only a prefix differs: rename {old!r} to {new!r} in its keys and all {len(extra)} find their place"
        )
    return found


def _is_made_later(name: str, expected: Shapes, config: Any) -> bool:
    """Return whether PEFT makes the place of a tensor only where there are values (0.21.2, samplers of MonteCLoRA)."""
    module, found, _ = name.partition(".lora_monteclora_sampler.")
    used = getattr(config, "monteclora_config", None) is not None
    return bool(found) and used and f"{module}.lora_A.weight" in expected


def _is_tied_twin(name: str, shape: tuple[int, ...], expected: Shapes, ends: Mapping[str, nn.Parameter]) -> bool:
    """Return whether PEFT wrote these trained tokens a second time, for the tied embedding or head."""
    place, found, _ = name.removeprefix(PREFIX).partition(_TRAINED_TOKENS)
    alike = [other for other in expected if other.endswith(_TRAINED_TOKENS) and expected[other] == shape]
    return bool(found and alike) and f"{place}.weight" in ends


def _list_first(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, first {names[0]}"


def _shorten_error(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


def ends_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the input embedding and the output head of a model, under each of their names."""
    found: dict[str, nn.Module] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end: Any = getattr(model, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if end is not None:
            found |= {name: end for name, module in model.named_modules(remove_duplicate=False) if module is end}
    return found


def _find_end_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the embedding and head modules, without submodules, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, end in ends_of(base).items():
        found |= {f"{name}.{key}": value for key, value in end._parameters.items() if value is not None}
    return found


@contextmanager
def shorten_tables(config: Any, base: nn.Module) -> Iterator[None]:
    """Within the block, a configuration has short tables of ranks and alphas, with the same values for every module.

    PEFT 0.21.2 compares every key with every target, and compiles each anew if there are more than 512: 560 keys, as
    EVA can write them for 80 layers, take half a minute.

    Args:
        config: PEFT's configuration; the tables are put back afterwards.
        base: The model that it is for, without adapters.
    """
    before = {field: getattr(config, field) for field in ("rank_pattern", "alpha_pattern")}
    names = [name for name, _ in base.named_modules()]
    # PEFT itself makes the names that these fields adapt.
    if not config.layer_replication and not config.target_parameters:
        for field, table in before.items():
            if len(table or ()) > _FEW_KEYS:
                setattr(config, field, PatternTable(table).group(names))
    try:
        yield
    finally:
        for field, table in before.items():
            setattr(config, field, table)


def adapter_shapes(base: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that PEFT creates for a configuration on a base without weights.

    Raises:
        ValueError: PEFT cannot apply the configuration to this base.
    """
    return _wrap(base, config)[1]


def _wrap(base: nn.Module, config: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    from peft import get_peft_model, get_peft_model_state_dict

    # Initializations need values, which a model on the meta device lacks.
    config.init_lora_weights = False
    held: Any = getattr(base, "peft_config", None) or {}
    if any(getattr(other, "layer_replication", None) for other in held.values()):
        # A model in memory whose layers PEFT has replicated already.
        config.layer_replication = None
    with warnings.catch_warnings(), shorten_tables(config, base):
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, config, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return model, {name: tuple(tensor.shape) for name, tensor in state.items()}


def _rename_as_peft(given: Shapes, wrapped: Any, config: Any) -> Shapes:
    """Return the shapes under the names to which PEFT converts the tensors of an older file on loading."""
    import torch

    convert = _find_conversion()
    if convert is None:
        return given
    state = {name: torch.empty(shape, device="meta") for name, shape in given.items()}
    try:
        converted = convert(wrapped, config, state, "default")
    except Exception:
        # Conversions concatenate and split tensors; tensors that do not fit were reported by name.
        return given
    return {_strip_adapter_name(name): tuple(tensor.shape) for name, tensor in converted.items()}


def _strip_adapter_name(name: str) -> str:
    return name.replace(".default.", ".").removesuffix(".default")


def _find_conversion() -> Callable[..., dict[str, torch.Tensor]] | None:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        # A private module of PEFT (seen in 0.19 to 0.21.2); a release without it renames nothing.
        return None
    found: Callable[..., dict[str, torch.Tensor]] = convert_peft_adapter_state_dict_for_transformers
    return found


def _find_rename(
    extra: Sequence[str],
    missing: Sequence[str],
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> tuple[str, str] | None:
    """Return a prefix and what to rename it to so that all stored tensors match a place; ``None`` if none does.

    Args:
        extra: Stored tensors without a place.
        missing: Places without a tensor.
        stored: Shapes of the stored tensors.
        expected: Shapes of the places.
    """
    if not extra or len(extra) != len(missing):
        return None
    candidates = sorted(
        {_split_prefixes(extra[0], place) for place in missing}, key=lambda pair: len(pair[0] + pair[1])
    )
    free = set(missing)
    for old, new in candidates:
        renamed = {name: new + name.removeprefix(old) for name in extra if name.startswith(old)}
        fits = all(expected.get(to) == stored[name] for name, to in renamed.items())
        if len(renamed) == len(extra) and fits and set(renamed.values()) == free:
            return old, new
    return None


def _split_prefixes(name: str, place: str) -> tuple[str, str]:
    """Return two names without their common suffix of dotted parts."""
    one, other = name.split("."), place.split(".")
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return ".".join(one[: len(one) - same]), ".".join(other[: len(other) - same])
