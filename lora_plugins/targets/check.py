"""Check that everything a configuration names is in the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from lora_plugins.errors import TargetWarning, UnmatchedTargets
from lora_plugins.models.structure import matches
from lora_plugins.models.wrapping import base_of, plain_path
from lora_plugins.targets.patterns import match_paths
from lora_plugins.targets.tasks import PEFT_HEADS
from lora_plugins.text import find_near, show_near

__all__ = ["check_fields", "check_names"]


#: Most blocks that ``layer_replication`` may create.
_MOST_BLOCKS = 4096


def check_names(model: nn.Module, config: Any, *, strict: bool = True) -> None:
    """Check a PEFT configuration against the model that has an adapter made from it.

    Args:
        model: A `peft.PeftModel` with an adapter made from this configuration.
        config: The adapter's configuration, of any of PEFT's methods.
        strict: Whether what touches nothing is an error; else it is a warning.

    Raises:
        UnmatchedTargets: A name, a pattern, an index or a number touches nothing; all are named.
        TargetError: A pattern is not valid or takes too long to match.
    """
    names = [name for name, own in getattr(model, "peft_config", {}).items() if own is config]
    adapted = {
        plain_path(path)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and _has_adapter(module, names)
    }
    asked = {name: getattr(config, name, None) for name in (*_CHECKS, "task_type", "r", "lora_alpha")}
    # PEFT has already replicated the blocks.
    asked["layer_replication"] = None
    base = base_of(model)
    if set(_as_list(asked["target_modules"])) == _find_default_targets(base):
        # These are PEFT's defaults, not the user's choice; the table covers all variants of a model type.
        asked["target_modules"] = None
    check_fields(base, asked, adapted, strict=strict)


def _has_adapter(module: BaseTunerLayer, names: Collection[str]) -> bool:
    return any(name in getattr(module, part, ()) for part in module.adapter_layer_names for name in names)


def _find_default_targets(model: nn.Module) -> set[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ()))


def check_fields(base: nn.Module, asked: Mapping[str, Any], adapted: Collection[str], *, strict: bool = True) -> None:
    """Check the given fields of a configuration against a base model and the modules in it that get adapters.

    Args:
        base: The base model, wrapped or not.
        asked: Fields of a PEFT configuration; those that were not given are absent or ``None``.
        adapted: Paths of the modules that have or get adapters.
        strict: Whether what touches nothing is an error; else it is a warning.

    Raises:
        UnmatchedTargets: A name, a pattern, an index or a number touches nothing; all are named.
        TargetError: A pattern is not valid or takes too long to match.
    """
    scene = _Scene(base, adapted, asked)
    problems = [
        problem
        for field, check in _CHECKS.items()
        if asked.get(field) is not None
        for problem in check(scene, field, asked[field])
    ]
    if not problems:
        return
    text = f"{type(base).__name__}: " + "; ".join(problems[:8]) + (" ..." if len(problems) > 8 else "") + "."
    if strict:
        raise UnmatchedTargets(text)
    warnings.warn(text, TargetWarning, stacklevel=2)


class _Scene:
    """The paths of a model that fields are checked against."""

    def __init__(self, base: nn.Module, adapted: Collection[str], asked: Mapping[str, Any]) -> None:
        self.base = base
        self.asked = asked
        self.modules = [plain_path(path) for path, _ in base.named_modules(remove_duplicate=False) if path]
        self.modules = [path for path in dict.fromkeys(self.modules) if not _is_of_adapter(path)]
        self.parameters = [plain_path(name) for name, _ in base.named_parameters(remove_duplicate=False)]
        stacked = _as_list(asked.get("target_parameters"))
        self.adapted = sorted(adapted)
        self.reached = [*self.adapted, *(p for p in self.parameters if any(matches(p, name) for name in stacked))]

    def near(self, name: str, among: Iterable[str]) -> str:
        """Return a name with similar names from ``among``, for a message."""
        last = name.rpartition(".")[2]
        leaves = sorted(leaf for path in among if not (leaf := path.rpartition(".")[2]).isdigit() and leaf != last)
        return show_near(name, find_near(last, dict.fromkeys(leaves), most=2, cutoff=0.5))


def _is_of_adapter(path: str) -> bool:
    return any(part in f".{path}." for part in (".lora_", ".modules_to_save.", ".trainable_tokens_", ".token_adapter."))


def _as_list(value: Any) -> list[Any]:
    return [] if value is None or isinstance(value, (str, int, Mapping)) else list(value)


def _check_targets(scene: _Scene, field: str, value: Any) -> Iterable[str]:
    if isinstance(value, str):
        if value != "all-linear" and not match_paths(value, scene.adapted, field):
            yield f"{field}={value[:80]!r} reaches no module"
        return
    missing = sorted(str(name) for name in value if not any(matches(path, name) for path in scene.adapted))
    if missing:
        yield f"{field} reaches no module by {', '.join(scene.near(name, scene.modules) for name in missing)}"


def _check_excluded(scene: _Scene, field: str, value: Any) -> Iterable[str]:
    if isinstance(value, str):
        if not match_paths(value, scene.modules, field):
            yield f"{field}={value[:80]!r} leaves nothing out"
        return
    for name in value:
        found = [path for path in scene.modules if matches(path, name)]
        if not found:
            yield f"{field} leaves nothing out by {scene.near(name, scene.modules)}"
        elif all(_holds_others(scene.base, path) for path in found):
            pattern = rf".*\b{name}\b.*"
            yield (
                f"{field} leaves nothing out by {name!r}: PEFT compares names with the end of a path, and what is "
                f"inside it is adapted. Write the pattern {pattern!r}"
            )


def _holds_others(base: nn.Module, path: str) -> bool:
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return False
    return not isinstance(module, BaseTunerLayer) and any(True for _ in module.children())


def _check_saved(scene: _Scene, field: str, value: Any) -> Iterable[str]:
    # PEFT 0.21.2 adds the names of a task's heads itself, whether or not the model has them.
    own = PEFT_HEADS.get(str(getattr(scene.asked.get("task_type"), "value", scene.asked.get("task_type"))), ())
    for name in value:
        if name not in own and not any(path.endswith(name) for path in scene.modules):
            yield f"{field} saves nothing by {scene.near(str(name), scene.modules)}"


def _check_table(scene: _Scene, field: str, value: Mapping[str, Any]) -> Iterable[str]:
    for key, number in value.items():
        if not match_paths(rf"(.*\.)?({key})", scene.reached, field):
            yield f"{field} sets {number!r} for no adapted module by {scene.near(key, scene.reached)}"
        if not number > 0:
            yield f"{field}[{key!r}]={number!r} must be above zero: the adapter would do nothing"


def _check_layers(scene: _Scene, field: str, value: int | Sequence[int]) -> Iterable[str]:
    indices = {int(part) for path in scene.reached for part in path.split(".") if part.isdigit()}
    missing = [index for index in ([value] if isinstance(value, int) else value) if index not in indices]
    if missing:
        known = f"{min(indices)} to {max(indices)}" if indices else "none"
        yield f"{field} names layers without an adapter: {', '.join(map(str, missing))} (with one: {known})"


def _check_layers_pattern(scene: _Scene, field: str, value: str | Sequence[str]) -> Iterable[str]:
    for name in [value] if isinstance(value, str) else value:
        if not match_paths(rf"(?:.*?\.)?{name}\.\d+\..*", scene.reached, field):
            yield f"{field}={name!r} does not name a list of layers with adapters"


def _check_parameters(scene: _Scene, field: str, value: Iterable[str]) -> Iterable[str]:
    for name in value:
        if not any(matches(path, name) for path in scene.parameters):
            yield f"{field} reaches no parameter by {scene.near(name, scene.parameters)}"


def _check_tokens(scene: _Scene, field: str, value: Any) -> Iterable[str]:
    for name, indices in value.items() if isinstance(value, Mapping) else [(None, value)]:
        rows = _count_rows(scene, name)
        if rows is None:
            yield f"{field} reaches no embedding by {scene.near(str(name), scene.modules)}"
            continue
        outside = [index for index in indices if not 0 <= index < rows]
        if outside:
            yield f"{field} names rows that are not there: {', '.join(map(str, outside[:8]))} (there are {rows})"
        if not indices:
            yield f"{field} is empty" + (f" for {name!r}" if name else "")


def _count_rows(scene: _Scene, name: str | None) -> int | None:
    """Return the rows of the embedding called ``name`` (``None``: the input embedding), ``None`` if there is none."""
    if name is None:
        try:
            weight = scene.base.get_input_embeddings().weight  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            return None
        return int(weight.shape[0])
    for path, value in scene.base.named_parameters(remove_duplicate=False):
        plain = plain_path(path)
        if plain.endswith(".weight") and matches(plain.removesuffix(".weight"), name) and value.ndim == 2:
            return int((getattr(value, "ds_shape", None) or value.shape)[0])
    return None


def _check_replication(scene: _Scene, field: str, value: Sequence[Sequence[int]]) -> Iterable[str]:
    count = getattr(getattr(scene.base, "config", None), "num_hidden_layers", None)
    wrong = [pair for pair in value if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= (count or pair[1])]
    if wrong:
        yield f"{field} has ranges without a layer: {', '.join(map(str, wrong[:4]))} (the model has {count} layers)"
    elif sum(end - start for start, end in value) > _MOST_BLOCKS:
        yield f"{field} makes more than {_MOST_BLOCKS} layers"


def _check_number(scene: _Scene, field: str, value: float) -> Iterable[str]:
    if not value > 0:
        yield f"{field}={value!r} must be above zero: the adapter would do nothing"


#: The check of each field; fields that are not listed hold neither names nor indices.
_CHECKS: dict[str, Callable[[_Scene, str, Any], Iterable[str]]] = {
    "target_modules": _check_targets,
    "feedforward_modules": _check_targets,
    "exclude_modules": _check_excluded,
    "modules_to_save": _check_saved,
    "rank_pattern": _check_table,
    "alpha_pattern": _check_table,
    "layers_to_transform": _check_layers,
    "layers_pattern": _check_layers_pattern,
    "target_parameters": _check_parameters,
    "trainable_token_indices": _check_tokens,
    "layer_replication": _check_replication,
    "lora_alpha": _check_number,
}
