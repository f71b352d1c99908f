"""Find short names by which PEFT adapts the chosen modules only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from peft import LoraConfig
from torch import nn

__all__ = ["rewritten_names", "shortest_names"]


def shortest_names(wanted: Iterable[str], existing: Iterable[str], parts: int = 1) -> list[str]:
    """Return names that match exactly the wanted paths by PEFT's rule: a name matches the end of a path, at a dot.

    A name is the shortest end of a path that no unwanted path shares; where that would hold an index, the whole
    path is used.

    Args:
        wanted: Paths to name.
        existing: All paths that PEFT will compare with the names, ``wanted`` among them.
        parts: The fewest parts of a name.
    """
    targets = set(wanted)
    all_counts = Counter(end for path in existing for end in _list_ends(path))
    wanted_counts = Counter(end for path in targets for end in _list_ends(path))
    clean = {end for end, count in wanted_counts.items() if all_counts[end] == count}
    return sorted({_find_shortest(path, clean, parts) for path in targets})


def _find_shortest(path: str, clean: set[str], parts: int) -> str:
    for end in list(_list_ends(path))[parts - 1 :]:
        if any(part.isdigit() for part in end.split(".")):
            break
        if end in clean:
            return end
    return path


def _list_ends(path: str) -> Iterator[str]:
    """Return the ends of a dotted path, shortest first."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def rewritten_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that PEFT would rewrite or refuse.

    For mixture-of-experts models whose experts were modules in older releases of transformers, PEFT 0.21.2 reads
    ``gate_proj``, ``up_proj`` and ``down_proj`` as the routed experts of those releases, even at the end of a
    longer name, so shared experts and dense layers cannot be named as modules.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        # A private module of PEFT (seen in 0.19 to 0.21.2); a release without it rewrites nothing.
        return set()
    rewritten = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            # PEFT 0.21.2 refuses one half of a fused pair on its own.
            rewritten.add(name)
            continue
        if name not in (config.target_modules or ()):
            rewritten.add(name)
    return rewritten
