"""Does an adapter belong to a base model? Names, shapes and identity, compared before a weight is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.base.fingerprint import Comparison, TensorSource, compare
from registry.base.renames import rename_hint
from registry.errors import BaseMismatch
from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import BaseRecord, TensorRecord

if TYPE_CHECKING:
    from torch import nn

    from registry.formats.manifest import Manifest

__all__ = ["CheckResult", "check"]

Shapes = Mapping[str, tuple[int, ...]]
_EXAMPLES = 3
#: Keys of a configuration that people know a model by come first.
_KNOWN_BY = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size")


@dataclass(frozen=True)
class CheckResult:
    """An adapter fits a base model.

    Attributes:
        tensors: How many tensors of the adapter have their place in the base.
        identity: ``"verified"`` where tensors of the base were compared with those it was trained on, ``"unverified"``
            where only names, shapes and configuration were.
    """

    tensors: int
    identity: str

    def __str__(self) -> str:
        told = "the base is the one it was trained on" if self.identity == "verified" else "identity not verified"
        return f"compatible, {told}: {self.tensors} tensors"


def check(
    manifest: Manifest,
    config: AdapterConfig,
    base: nn.Module,
    values: Mapping[str, object],
    source: TensorSource | None,
    *,
    title: str,
) -> CheckResult:
    """Compare an adapter with a base model.

    Args:
        manifest: Of the adapter.
        config: Its configuration.
        base: The base model without weights (`registry.base.skeleton.skeleton`); it is changed.
        values: `registry.base.fingerprint.config_values` of the base.
        source: Where tensors of the base can be read, if they can.
        title: What messages call the base.

    Raises:
        BaseMismatch: It is another base; the message says what the adapter was trained on, what this is, and how they
            differ.
    """
    problems = [
        *_vocabulary(manifest, base, config),
        *_tensors(manifest.tensors, config, base),
    ]
    recorded = manifest.base.fingerprint
    found = compare(recorded, values, source) if recorded else Comparison((), (), verified=False)
    if found.configuration:
        problems.append(_configuration(found))
    if found.tensors and not problems:
        problems.append(
            f"it has the same shapes and other weights: {', '.join(found.tensors)} of the base differ from those that "
            "the adapter was trained on"
        )
    if problems:
        raise BaseMismatch(
            f"The adapter {manifest.version} was trained on {describe(manifest.base, manifest.architecture.class_name)}"
            f" and does not fit {title}: {'; '.join(problems)}. Nothing was loaded."
        )
    return CheckResult(len(manifest.tensors), "verified" if found.verified else "unverified")


def describe(base: BaseRecord, class_name: str | None) -> str:
    """What an adapter was trained on, in words."""
    at = f" at commit {base.commit[:12]}" if base.commit else ""
    kind = f" ({class_name})" if class_name else ""
    return f"{base.id or 'a base known by its fingerprint'}{at}{kind}"


def _vocabulary(manifest: Manifest, base: nn.Module, config: AdapterConfig) -> list[str]:
    trained, here = manifest.architecture.vocab_size, rows_of_embedding(base)
    if trained is None or here is None or trained == here:
        return []
    return [
        f"the vocabulary has {here:,} entries here and had {trained:,} in training. If tokens were added, add them "
        f"here, too: base.resize_token_embeddings({trained})"
    ]


def rows_of_embedding(model: nn.Module) -> int | None:
    """How many rows the input embedding of a model has."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0])


def _configuration(found: Comparison) -> str:
    def order(difference: tuple[str, object, object]) -> tuple[bool, str]:
        return difference[0] not in _KNOWN_BY, difference[0]

    shown = [f"{key} is {here!r}, was {there!r}" for key, there, here in sorted(found.configuration, key=order)]
    more = f" and {len(shown) - _EXAMPLES} more" if len(shown) > _EXAMPLES else ""
    return f"the configuration differs: {', '.join(shown[:_EXAMPLES])}{more}"


def _tensors(stored: Mapping[str, TensorRecord], config: AdapterConfig, base: nn.Module) -> list[str]:
    """What is wrong with names and shapes: those of the adapter against those that PEFT would make on this base."""
    own = {name: tuple(parameter.shape) for name, parameter in base.named_parameters(remove_duplicate=False)}
    try:
        expected = adapter_shapes(base, config)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        return [f"PEFT can't put it into this model ({reason})"]
    given = {name: record.shape for name, record in stored.items()}
    # Embeddings of the base may be saved along with the adapter, under the names that they have in it.
    extra = sorted(name for name in set(given) - set(expected) if not _is_base_tensor(name, given[name], own))
    missing = sorted(set(expected) - set(given))
    shapes = [name for name in given if name in expected and given[name] != expected[name]]
    problems = []
    if extra:
        problems.append(_listed(extra, f"of {len(given)} tensors have no place in it"))
    if missing:
        problems.append(_listed(missing, f"of its {len(expected)} places get no tensor"))
    if shapes:
        told = [f"{name} is {given[name]}, has to be {expected[name]} here" for name in sorted(shapes)]
        problems.append(_listed(told, "tensors have another shape"))
    hint = rename_hint(extra, missing, given, expected)
    return [*problems, hint] if hint else problems


def _listed(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, first {names[0]}"


def _is_base_tensor(name: str, shape: tuple[int, ...], own: Shapes) -> bool:
    inner = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return "lora_" not in name and own.get(inner) == shape


def adapter_shapes(base: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that PEFT makes for a configuration on a base without weights.

    Raises:
        ValueError: PEFT can't adapt this base that way.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    made = peft_config(config)
    # Initialisations need values, and a skeleton has none.
    made.init_lora_weights = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, made, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def peft_config(config: AdapterConfig) -> Any:
    """The configuration as the installed PEFT understands it.

    Raises:
        BaseMismatch: It has fields, not at their default, that this PEFT doesn't know.
    """
    import inspect

    import peft

    known = inspect.signature(peft.LoraConfig).parameters
    unknown = sorted(k for k, v in config.fields.items() if k not in known and v not in (None, {}, [], False))
    if unknown:
        raise BaseMismatch(
            f"The adapter was saved by PEFT {config.peft_version or 'of another release'} with "
            f"{', '.join(f'{key}={config.fields[key]!r}' for key in unknown)}, which PEFT {peft.__version__} does not "
            "know and would ignore. Update PEFT: pip install -U peft"
        )
    fields = {key: value for key, value in config.fields.items() if key in known}
    return peft.LoraConfig(**{**fields, "auto_mapping": None})
