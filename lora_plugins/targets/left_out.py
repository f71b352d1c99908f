"""Say why modules have no adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from lora_plugins.models.structure import collapse, is_under
from lora_plugins.targets.candidates import Candidates
from lora_plugins.targets.records import LeftOut

__all__ = ["list_left_out"]


def list_left_out(
    candidates: Candidates,
    adapted: Collection[str],
    named: Collection[str],
    source: str,
    policy: str,
    saved: Sequence[str],
) -> list[LeftOut]:
    """Return the modules with weights that have no adapter, those that are alike in one row, each with the reason.

    Args:
        candidates: The modules of the model.
        adapted: Paths of the modules and parameters with adapters.
        named: Paths that the request means, before any is left out.
        source: Where the targets come from.
        policy: What is asked for of experts.
        saved: Names of the modules that are trained and saved whole, besides heads.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for path, module in candidates.structure.modules.items():
        weights = [name for name, value in module._parameters.items() if value is not None]
        if path in adapted or not weights or any(f"{path}.{name}" in adapted for name in weights):
            continue
        why = _find_reason(candidates, path, named, source, policy, saved)
        counts[collapse(path), why] += 1
    return [LeftOut(name, count, why) for (name, why), count in counts.items()]


def _find_reason(
    candidates: Candidates, path: str, named: Collection[str], source: str, policy: str, saved: Sequence[str]
) -> str:
    kind = type(candidates.structure.modules[path]).__name__
    if is_under(path, candidates.heads):
        return "a head: trained and saved whole, without an adapter"
    if is_under(path, saved):
        return "named by modules_to_save: trained and saved whole"
    if path not in candidates.structure.linears and path not in candidates.adaptable:
        return f"of the class {kind}, which takes no adapter"
    if path in named and candidates.left_out(path):
        return candidates.explain_left_out(path)
    if candidates.is_forbidden(path):
        return _explain_forbidden(candidates, path)
    if source == "the names given":
        return _explain_unnamed(candidates, path)
    if source == "the pattern given":
        return "not matched by the pattern in target_modules"
    role = candidates.find_role(path)
    if role == "expert":
        return f"a routed expert, and experts={policy!r}"
    return {
        "encoder": "in an encoder beside the language model, which only the scope 'vision' or a longer name reaches",
        "router": "a router of experts, which is taken only where it is named",
        "output": "the output layer, which is taken only where it is named",
    }.get(role, "not a linear layer: taken only where it is named" if role == "other" else f"not a target of {source}")


def _explain_forbidden(candidates: Candidates, path: str) -> str:
    if is_under(path, candidates.never):
        return "an adapter here would be wrong: the architecture's record lists it under never"
    return "its weight is read without calling it, so an adapter would have no effect"


def _explain_unnamed(candidates: Candidates, path: str) -> str:
    if candidates.find_role(path) == "encoder":
        return "in an encoder beside the language model, which names in target_modules reach only if they are longer"
    return "not named in target_modules"
