"""What differs between two releases, by their manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.checks.lineage import compare_lineage
from registry.formats.manifest import Manifest

__all__ = ["Difference", "LayerChange", "compare_manifests"]


@dataclass(frozen=True)
class LayerChange:
    """How a layer's weight differs: Frobenius norms of what the adapters add to it.

    Attributes:
        name: Name of the layer in the base model.
        before: Norm of what the first adapter adds; 0.0 if it does not adapt the layer.
        after: The same for the second adapter.
        change: Norm of the difference.
    """

    name: str
    before: float
    after: float
    change: float


@dataclass(frozen=True)
class Difference:
    """What differs between two releases; values as ``(before, after)``.

    Attributes:
        before: The first release, ``org/name@version``.
        after: The second.
        config: Fields of the configuration that differ; ``None`` is the default.
        metrics: Metrics of either release.
        base: Id, commit and fingerprint of the base model, where they differ.
        layers: Every layer that either release adapts.
        lineage: What they were trained from, where it differs, by dotted field.
    """

    before: str
    after: str
    config: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, tuple[float | None, float | None]]
    base: Mapping[str, tuple[Any, Any]]
    layers: tuple[LayerChange, ...]
    lineage: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def compare_manifests(
    before: tuple[str, Manifest], after: tuple[str, Manifest], layers: Sequence[LayerChange] = ()
) -> Difference:
    """Compare two releases.

    Args:
        before: Name and manifest of the first.
        after: The same of the second.
        layers: How their layers differ, where that was measured.
    """
    one, two = before[1], after[1]
    bases = {key: (getattr(one.base, key), getattr(two.base, key)) for key in ("id", "commit", "fingerprint")}
    return Difference(
        before[0],
        after[0],
        _compare_fields(one.config, two.config),
        {key: (one.metrics.get(key), two.metrics.get(key)) for key in sorted({*one.metrics, *two.metrics})},
        {key: pair for key, pair in bases.items() if pair[0] != pair[1]},
        tuple(layers),
        compare_lineage(one.lineage, two.lineage),
    )


def _compare_fields(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted({*one, *two})
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}
