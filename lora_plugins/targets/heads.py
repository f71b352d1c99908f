"""Choose what is trained and saved whole: new heads, new rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from lora_plugins.errors import FrozenHead, UnmatchedTargets
from lora_plugins.models.structure import Structure, is_under
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.plugins.types import Architecture
from lora_plugins.targets.architectures import find_record
from lora_plugins.targets.initialized import Grown, Initialized, find_initialized, find_untrained
from lora_plugins.targets.peft_names import shortest_names
from lora_plugins.targets.records import Required
from lora_plugins.text import find_near, show_near

__all__ = ["Heads", "check_trained", "choose_heads", "choose_tokens", "find_required", "task_heads"]


#: Names of heads in models that are not registered.
_KNOWN = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class Heads:
    """The newly initialized parts of a model, and the modules that hold them.

    Attributes:
        modules: Paths of the modules that are trained and saved whole.
        names: Their names for PEFT, which matches a name against the end of a path.
        required: What a run must train and save.
        found: The newly initialized parameters, and the evidence.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    required: Required
    found: Initialized


def choose_heads(structure: Structure, record: Architecture | None, frozen: Sequence[str] = ()) -> Heads:
    """Choose the modules to train and save whole, so that no new parameter keeps its initial values.

    Args:
        structure: The base model's parts.
        record: The architecture's record, which names heads.
        frozen: Names of modules or parameters that stay as they are on purpose.

    Raises:
        UnmatchedTargets: A name in ``frozen`` is not in the model.
        FrozenHead: A new parameter is in no module that PEFT could save.
    """
    _check_frozen(structure, frozen)
    known = _list_heads(record)
    encoders = record.vision if record is not None else ()
    heads = [path for path in structure.task_heads(known) if not is_under(path, (*frozen, *encoders))]
    found = find_initialized(structure.model, heads)
    new = tuple(name for name in found.parameters if not is_under(name, frozen))
    if found.evidence == "structure":
        modules = heads
    else:
        modules, alone = _hold_new(structure, new)
        if alone:
            raise FrozenHead(_explain_alone(structure.model, alone))
        # A head from the checkpoint is trained too; a module deeper in the model counts only if it is new.
        modules += [path for path in heads if path in known and "." not in path and path not in modules]
    return Heads(tuple(modules), tuple(_find_names(modules, structure)), _require(found, frozen), found)


def find_required(model: nn.Module, frozen: Sequence[str] = (), host: PluginHost | None = None) -> Required:
    """Find what is newly initialized in a base model, with or without PEFT adapters in it.

    Args:
        model: The base model.
        frozen: Names of modules or parameters that stay as they are on purpose.
        host: Where to look architectures up; default is the process's plugin host.

    Raises:
        UnmatchedTargets: A name in ``frozen`` is not in the model.
    """
    structure = Structure(model)
    _check_frozen(structure, frozen)
    record = find_record(model, host or plugin_host())
    return _require(find_initialized(model, structure.task_heads(_list_heads(record))), frozen)


def _require(found: Initialized, frozen: Sequence[str]) -> Required:
    rows = [f"{item.path}.weight" for item in found.grown]
    names = tuple(name for name in (*found.parameters, *rows) if not is_under(name, frozen))
    return Required(names, dict(found.rows), found.note(), tuple(frozen))


def _list_heads(record: Architecture | None) -> tuple[str, ...]:
    return record.heads if record is not None else _KNOWN


def check_trained(model: nn.Module, required: Required) -> None:
    """Refuse a run that would leave newly initialized parameters untrained.

    Args:
        model: The base model of the model in the Trainer.
        required: What was found when the model was prepared.

    Raises:
        FrozenHead: A new parameter is neither trained nor saved, or an embedding has gained untrained rows since.
    """
    found = find_initialized(model)
    missing = find_untrained(model, required.parameters)
    later = [path for path, rows in required.vocabulary.items() if found.rows.get(path, 0) > rows]
    tokens = [item for item in found.grown if item.spare and not is_under(f"{item.path}.weight", required.frozen)]
    embeddings = [f"{path}.weight" for path in (*later, *(item.path for item in tokens))]
    missing += [name for name in find_untrained(model, dict.fromkeys(embeddings)) if name not in missing]
    if missing:
        left = [item for item in tokens if f"{item.path}.weight" in missing]
        raise FrozenHead(_explain_tokens(model, left) if len(left) == len(missing) else _explain_new(model, missing))


def _explain_new(model: nn.Module, missing: list[str]) -> str:
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in missing))
    short = [path.rpartition(".")[2] for path in owners]
    return (
        f"Newly initialized weights of {type(model).__name__} are neither trained nor saved: "
        f"{', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}. They would keep their random values, and "
        f"a reload would have others. Train them with modules_to_save={short[:4]!r} in the LoraConfig (or set its "
        "task_type, such as 'SEQ_CLS'; for new rows of an embedding trainable_token_indices), or leave them as "
        f"they are on purpose with frozen={short[:4]!r} in LoraCallback or prepare_model."
    )


def _explain_tokens(model: nn.Module, left: Sequence[Grown]) -> str:
    spare = left[0].spare
    names = ", ".join(map(repr, list(spare.values())[:6])) + (" ..." if len(spare) > 6 else "")
    short = [item.path.rpartition(".")[2] for item in left]
    rows = f"list(range({min(spare)}, {max(spare) + 1}))" if len(spare) > 6 else f"{list(spare)}"
    cure = ", ".join(f"{name!r}: {rows}" for name in short)
    return (
        f"The tokenizer has {len(spare)} tokens that the own tokenizer of this {type(model).__name__} does not have "
        f"({names}). They fit into spare rows of its vocabulary, which nobody has trained: frozen, they would mean "
        f"nothing. Train them with trainable_token_indices={{{cure}}} in the LoraConfig, "
        f"or leave them as they are on purpose with frozen={short!r} in LoraCallback or prepare_model."
    )


def task_heads(model: nn.Module, host: PluginHost | None = None) -> list[str]:
    """Return the names of the heads of a model that are trained and saved whole."""
    return list(choose_heads(Structure(model), find_record(model, host or plugin_host())).names)


def _check_frozen(structure: Structure, frozen: Sequence[str]) -> None:
    paths = [*structure.modules, *structure.parameters]
    missing = [name for name in frozen if not any(is_under(path, [name]) for path in paths)]
    if missing:
        leaves = sorted({path.rpartition(".")[2] for path in structure.modules})
        text = ", ".join(show_near(name, find_near(name.rpartition(".")[2], leaves, most=2)) for name in missing)
        raise UnmatchedTargets(f"frozen= names what {type(structure.model).__name__} does not have: {text}.")


def _explain_alone(model: nn.Module, names: list[str]) -> str:
    return (
        f"{type(model).__name__} has newly initialized parameters that PEFT cannot save, because they belong to whole "
        f"blocks or to the model itself: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}. They would keep "
        "their initial values and not be in the adapter. Load a checkpoint that has them, put them into a module of "
        f"their own, or leave them as they are with frozen={[name.rpartition('.')[2] for name in names[:3]]!r}."
    )


def _find_names(modules: Sequence[str], structure: Structure) -> Iterator[str]:
    """Yield names by which PEFT finds these modules only: it compares the ends of paths, not only at dots."""
    wanted = set(modules)
    seen: set[str] = set()
    for path in modules:
        name = next(name for name in _list_ends(path) if name == path or _means_only(name, wanted, structure.modules))
        if name not in seen:
            seen.add(name)
            yield name


def _list_ends(path: str) -> Iterator[str]:
    parts = path.split(".")
    for start in range(len(parts) - 1, 0, -1):
        end = parts[start:]
        if any(part.isdigit() for part in end):
            break
        yield ".".join(end)
    yield path


def _means_only(name: str, wanted: set[str], paths: Iterable[str]) -> bool:
    return all(path in wanted for path in paths if path.endswith(name))


def choose_tokens(
    structure: Structure,
    grown: Iterable[Grown],
    asked: Mapping[str, Any],
    adapted: Iterable[str],
    frozen: Sequence[str],
) -> tuple[dict[str, list[int]] | None, list[str]]:
    """Return ``trainable_token_indices`` for rows that the checkpoint lacks, and the heads to save whole.

    A head whose bias has new entries too is trained and saved whole. Embeddings that the user already trains (whole,
    by rows or with an adapter) are left out.

    Args:
        structure: The base model's parts.
        grown: Embeddings with new rows.
        asked: The fields of ``peft.LoraConfig`` that were given.
        adapted: Paths of the modules that get adapters.
        frozen: Names of new parts that stay as they are on purpose.
    """
    saved = list(asked.get("modules_to_save") or ())
    given = asked.get("trainable_token_indices")
    covered = [*saved, *frozen, *(given if isinstance(given, Mapping) else ())]
    # PEFT 0.21.2 saves an adapted embedding whole, but only under these names.
    covered += [path for path in adapted if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    left = [item for item in grown if not is_under(item.path, covered)]
    tokens: dict[str, list[int]] = {}
    if given is not None and not isinstance(given, Mapping):
        # A plain list means rows of the input embedding, which comes first.
        own = [item for item in grown if not structure.output_heads & {item.path}]
        left = [item for item in left if item not in own]
        if not left:
            return None, []
        tokens = {name: list(given) for name in _shorten([item.path for item in own], structure)}
    elif given is not None:
        tokens = {name: list(indices) for name, indices in given.items()}
    whole = [item for item in left if getattr(structure.modules.get(item.path), "bias", None) is not None]
    by_rows = [item for item in left if item not in whole]
    for item in by_rows:
        tokens[_shorten([item.path], structure)[0]] = item.rows
    return tokens if by_rows else None, _shorten([item.path for item in whole], structure)


def _shorten(paths: Sequence[str], structure: Structure) -> list[str]:
    return [shortest_names([path], structure.modules)[0] for path in paths]


def _hold_new(structure: Structure, new: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the modules to train and save for the new parameters, and the parameters that none of them holds.

    A new parameter gets the largest module that holds new parameters only or, beside loaded parameters, the module
    that owns it. PEFT saves modules, so a parameter of the model itself, or of a module around its blocks, gets none.

    Args:
        structure: The model's parts.
        new: Paths of the new parameters.
    """
    names = set(new)
    mixed = {path for name in structure.parameters if name not in names for path in _list_ancestors(name)}
    blocks = {block.path for block in structure.blocks}
    around = {path for block in blocks for path in _list_ancestors(block)}
    # A new block among loaded ones is part of the model's own stack, which PEFT would have to wrap.
    added = {path for path in blocks if path not in mixed and path.rpartition(".")[0] in mixed}
    modules: dict[str, None] = {}
    alone = []
    for name in new:
        above = [path for path in _list_ancestors(name) if _can_be_saved(structure.modules.get(path))]
        whole = [path for path in above if path not in mixed]
        owner = name.rpartition(".")[0]
        if added.intersection(above) or not (whole or (owner in above and owner not in blocks | around)):
            alone.append(name)
        else:
            modules[whole[-1] if whole else owner] = None
    order = list(structure.modules)
    return sorted(modules, key=order.index), sorted(alone)


def _list_ancestors(path: str) -> Iterator[str]:
    """Yield the dotted paths above a path, nearest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _can_be_saved(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
