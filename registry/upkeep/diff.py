"""Compare two releases: configuration, metrics and layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.catalog.comparison import Difference, LayerChange, compare_manifests
from registry.errors import UnsafeFile
from registry.formats.adapter_config import AdapterConfig
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.patterns import PatternTable, find_slow
from registry.formats.strict_json import shown
from registry.formats.tensors import PREFIX, LoraModule, lora_modules
from registry.formats.weights import read_file_header, read_values

if TYPE_CHECKING:
    import numpy

    from registry.pulling.adapter import Adapter

__all__ = ["compare_adapters", "compare_layers"]


def compare_adapters(before: Adapter, after: Adapter) -> Difference:
    """Compare two pulled adapters; neither PEFT nor a model is needed.

    Raises:
        UnsafeFile: An expression in a configuration takes too long to match.
    """
    layers = _compare_layers(_Weights(Path(before.path)), _Weights(Path(after.path)))
    return compare_manifests((str(before), before.manifest), (str(after), after.manifest), layers)


def compare_layers(before: Path, after: Path) -> tuple[LayerChange, ...]:
    """Compare the layers of two adapter folders; the same folder twice gives the norm of what it adds to each layer.

    Raises:
        UnsafeFile: A file is malformed, or an expression in a configuration takes too long to match.
    """
    one = _Weights(before)
    return _compare_layers(one, one if before == after else _Weights(after))


class _Weights:
    """The weights in an adapter folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / ADAPTER_WEIGHTS
        self._header = read_file_header(self._file)
        self._config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes())
        self._ranks, self._alphas = (
            PatternTable(self._config.fields.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")
        )
        found = lora_modules(self._header.tensors)
        self.modules = {n: m for n, m in found.items() if m.first and m.second}
        self.others = set(self._header.tensors) - {
            name for m in found.values() for name in (m.first, m.second, *m.more)
        }
        slow = find_slow(self._config.expressions(), self.modules)
        if slow is not None:
            raise UnsafeFile(
                f"{slow[0]} of {folder} has the expression {shown(slow[1])}, which takes too long to match"
            )

    def tensor(self, name: str) -> numpy.ndarray:
        """Return the values of a tensor, in float64."""
        return read_values(self._file, self._header, name).astype("float64")

    def factors(self, name: str) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
        """Return scaled B, and A, of what the adapter adds to a layer: a pair per expert, none if it adds nothing."""
        module = self.modules.get(name)
        return [] if module is None else self._read_factors(name, module)

    def _read_factors(self, name: str, module: LoraModule) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
        first, second = self.tensor(module.first or ""), self.tensor(module.second or "")
        rank, scaling = self._read_scaling(name.removeprefix(PREFIX))
        rows = first.shape[0]
        experts = rows // rank if rank and rows % rank == 0 and self._config.fields.get("target_parameters") else 1
        if experts == 1:
            return [(scaling * second.reshape(-1, rows), first.reshape(rows, -1))]
        # PEFT 0.21.2 keeps the experts outermost in A and innermost in B.
        firsts, seconds = first.reshape(experts, rank, -1), second.reshape(-1, rank, experts)
        return [(scaling * seconds[:, :, index], firsts[index]) for index in range(experts)]

    def _read_scaling(self, name: str) -> tuple[int, float]:
        fields = self._config.fields
        rank = int(self._ranks.find(name, self._config.rank))
        alpha = float(self._alphas.find(name, fields.get("lora_alpha", 8)))
        return rank, alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _compare_layers(one: _Weights, two: _Weights) -> tuple[LayerChange, ...]:
    names = list(dict.fromkeys([*one.modules, *two.modules]))
    changes = [_compare_layer(name, one.factors(name), two.factors(name)) for name in names]
    changes += [_compare_other(name, one, two) for name in sorted(one.others | two.others)]
    return tuple(changes)


def _compare_layer(name: str, one: list[Any], two: list[Any]) -> LayerChange:
    longest = max(len(one), len(two))
    if {len(one), len(two)} - {0, longest}:
        raise ValueError(f"{name} has {len(one)} experts in one adapter and {len(two)} in the other")
    pairs = [(one[i] if one else None, two[i] if two else None) for i in range(longest)]
    norms = [[_compute_norm([a]), _compute_norm([b]), _compute_norm([a, _negate(b)])] for a, b in pairs]
    before, after, change = (sum(n[column] ** 2 for n in norms) ** 0.5 for column in range(3))
    return LayerChange(name.removeprefix(PREFIX), before, after, change)


def _compare_other(name: str, one: _Weights, two: _Weights) -> LayerChange:
    import numpy

    a = one.tensor(name) if name in one.others else None
    b = two.tensor(name) if name in two.others else None
    norms = [0.0 if tensor is None else float(numpy.linalg.norm(tensor)) for tensor in (a, b)]
    both = a is not None and b is not None and a.shape == b.shape
    change = float(numpy.linalg.norm(a - b)) if both else (norms[0] ** 2 + norms[1] ** 2) ** 0.5  # type: ignore[operator]
    return LayerChange(name.removeprefix(PREFIX), norms[0], norms[1], change)


def _negate(factors: Any) -> Any:
    return None if factors is None else (-factors[0], factors[1])


def _compute_norm(terms: list[Any]) -> float:
    """Return the Frobenius norm of a sum of products B A without forming the large matrix.

    It uses QR decompositions of the concatenated factors; differences of squares would lose half of the digits.
    """
    import numpy

    there = [term for term in terms if term is not None]
    if not there:
        return 0.0
    if len({(b.shape[0], a.shape[1]) for b, a in there}) > 1:
        # Layers of different sizes have no difference: combine their norms.
        return float(sum(_compute_norm([term]) ** 2 for term in there) ** 0.5)
    left: Any = numpy.linalg.qr(numpy.concatenate([b for b, _ in there], axis=1), mode="r")
    right: Any = numpy.linalg.qr(numpy.concatenate([a for _, a in there], axis=0).T, mode="r")
    return float(numpy.linalg.norm(left @ right.T))
