"""Read linear layers, blocks, experts and heads from a module tree.

Sizes come from the layers' attributes and not from the shape of a weight, which may be packed by a
quantization backend or empty under DeepSpeed ZeRO-3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

__all__ = [
    "Block",
    "BlockKind",
    "Linear",
    "Structure",
    "collapse",
    "is_expert_stack",
    "is_flat_stack",
    "is_under",
    "linear_features",
    "matches",
]


@dataclass(frozen=True)
class BlockKind:
    """A kind of repeated block: same stack, same class, same linear layers inside.

    Attributes:
        stack: Path of the container, with ``*`` for indices: ``"model.layers"``.
        name: Class of the blocks, with the parts that distinguish them where a stack mixes several kinds.
    """

    stack: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} in {self.stack}" if self.stack else self.name


@dataclass(frozen=True)
class Block:
    """One repeated block: its path and its kind."""

    path: str
    kind: BlockKind


@dataclass(frozen=True)
class Linear:
    """One linear layer of any class and storage format."""

    path: str
    in_features: int
    out_features: int
    block: Block | None = field(default=None, compare=False)

    @property
    def pattern(self) -> str:
        """The path with ``*`` for every index."""
        return collapse(self.path)


def collapse(path: str) -> str:
    """Return a dotted path with ``*`` for every index, so that equal modules of all layers share one string."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def matches(path: str, name: str) -> bool:
    """Whether a name matches a path as in PEFT: it equals the path or a dotted suffix of it."""
    return path == name or path.endswith("." + name)


def is_under(path: str, names: Iterable[str]) -> bool:
    """Whether a path contains one of the dotted names, at any depth."""
    dotted = f".{path}."
    return any(f".{name}." in dotted for name in names)


def linear_features(module: Any) -> tuple[int, int] | None:
    """Return ``(in_features, out_features)`` of a linear layer, ``None`` for anything else.

    A layer counts as linear when it has both attributes and no submodules: ``nn.Linear``, the packed layers of
    quantization backends, GPT-2's ``Conv1D``.
    """
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        nx = getattr(module, "nx", None)
        # Copies of this class in models' own code may not store the input size.
        return (nx if isinstance(nx, int) else int(module.weight.shape[0]), module.nf)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes) or next(module.children(), None) is not None:
        return None
    if not _is_layer_class(module):
        return None
    return sizes[0], sizes[1]  # type: ignore[return-value]


def _is_layer_class(module: nn.Module) -> bool:
    """Whether a module with both sizes is a linear layer; others compute something else, and PEFT cannot wrap them."""
    if isinstance(module, torch.nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    # A backend's packed layer holds integers, or has no `weight` at all.
    return not (isinstance(weight, torch.Tensor) and weight.is_floating_point())


class Structure:
    """The linear layers, blocks, experts and heads of one model.

    Args:
        model: The base model without PEFT's wrapper: in memory, on the meta device, or quantized.

    Attributes:
        modules: Every module by path; a shared one is listed once.
        linears: Every linear layer by path.
        blocks: The repeated blocks, in order.
        kinds: Number of blocks of each kind.
        expert_parameters: Paths of the stacked 3-D weights of routed experts.
        flat_experts: Paths of the 2-D weights that hold all routed experts one below the other, as DBRX's do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if path}
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        sizes = self._read_linear_sizes()
        self._counts = _count_beneath(sizes)
        self._sizes = sizes
        self.expert_parameters = [
            path for path, value in self.parameters.items() if is_expert_stack(path, value, self.modules)
        ]
        self.flat_experts = [
            path for path, value in self.parameters.items() if is_flat_stack(path, value, self.modules)
        ]
        self.blocks: list[Block] = self._find_blocks()
        self.kinds: Counter[BlockKind] = Counter(block.kind for block in self.blocks)
        by_path = {block.path: block for block in self.blocks}
        self.linears: dict[str, Linear] = {
            path: Linear(path, *size, block=_find_owner(path, by_path)) for path, size in sizes.items()
        }

    def block_of(self, path: str) -> Block | None:
        """Return the block that contains a module or parameter, ``None`` outside of blocks."""
        return _find_owner(path, self._blocks_by_path)

    @cached_property
    def _blocks_by_path(self) -> dict[str, Block]:
        return {block.path: block for block in self.blocks}

    @cached_property
    def output_heads(self) -> frozenset[str]:
        """Paths of the output embedding and of linear layers tied to an embedding; they belong to no scope."""
        head = self._get_embedding("get_output_embeddings")
        embeddings = {id(m.weight) for m in self.modules.values() if isinstance(m, torch.nn.Embedding)}
        tied = (path for path in self.linears if id(getattr(self.modules[path], "weight", None)) in embeddings)
        return frozenset(tied) | {path for path, module in self.modules.items() if module is head}

    def _get_embedding(self, getter: str) -> object | None:
        try:
            return getattr(self.model, getter)()
        except (AttributeError, NotImplementedError):
            return None

    def inside_block(self, path: str) -> str:
        """Return a path relative to its block; the whole path outside of blocks."""
        block = self.block_of(path)
        return path.removeprefix(block.path + ".") if block is not None else path

    def is_output_layer_of_attention(self, path: str) -> bool:
        """Whether this is the output layer of torch's attention: its weight is read, its forward is never called."""
        return isinstance(self.modules.get(path.rpartition(".")[0]), torch.nn.MultiheadAttention)

    def task_heads(self, known: Iterable[str] = ()) -> list[str]:
        """Return the paths of the modules with weights that a task class adds to the base model.

        A language model adds none: the head over its vocabulary is pretrained.

        Args:
            known: Paths of modules that always count as heads.
        """
        prefix = getattr(self.model, "base_model_prefix", "")
        stands_beside = prefix in self.modules and not self._is_language_model()
        beside = [name for name, _ in self.model.named_children() if name != prefix] if stands_beside else []
        beside = [name for name in beside if name in self.modules]
        # A norm beside the base is pretrained, and PEFT 0.21.2 would match every module whose name ends the same way.
        added = [name for name in beside if "Norm" not in type(self.modules[name]).__name__]
        heads = [name for name in dict.fromkeys([*added, *known]) if name in self.modules]
        return [path for name in heads for path in self._find_trainable_parts(name)]

    def _is_language_model(self) -> bool:
        # Models without token embeddings also name a head over classes or characters lm_head.
        vocabulary = isinstance(self._get_embedding("get_input_embeddings"), torch.nn.Embedding)
        return vocabulary and bool(self.output_heads)

    def _find_trainable_parts(self, path: str) -> list[str]:
        """Return the path, or those of a list's items (PEFT 0.21.2 cannot wrap a list); skip those without weights."""
        module = self.modules.get(path)
        if module is None:
            # Shared: the module is listed under another path.
            return []
        if not isinstance(module, torch.nn.ModuleList):
            return [path] if next(module.parameters(), None) is not None else []
        return [part for name, _ in module.named_children() for part in self._find_trainable_parts(f"{path}.{name}")]

    def expert_share(self) -> float:
        """Return the share of all weights that the stacked expert parameters hold, 0 to 1."""
        sizes = {path: int(getattr(value, "ds_numel", 0) or value.numel()) for path, value in self.parameters.items()}
        total = sum(sizes.values())
        return sum(sizes[path] for path in (*self.expert_parameters, *self.flat_experts)) / total if total else 0.0

    # -- reading the tree ----------------------------------------------------------------------

    def _read_linear_sizes(self) -> dict[str, tuple[int, int]]:
        sizes: dict[str, tuple[int, int]] = {}
        for path, module in self.modules.items():
            size = linear_features(module)
            if size is not None and not self.is_output_layer_of_attention(path):
                sizes[path] = size
        return sizes

    def _find_blocks(self) -> list[Block]:
        found = list(self._walk(self.model, "")) or list(self._find_numbered_siblings())
        signatures = {path: self._make_signature(path) for path, _ in found}
        groups: dict[tuple[str, str], dict[frozenset[str], list[str]]] = {}
        for path, module in found:
            stack = collapse(path.rpartition(".")[0])
            groups.setdefault((stack, type(module).__name__), {}).setdefault(signatures[path], []).append(path)
        kinds: dict[str, BlockKind] = {}
        for (stack, class_name), by_signature in groups.items():
            labels = _make_labels(list(by_signature))
            for signature, paths in by_signature.items():
                name = class_name + (f" ({labels[signature]})" if labels[signature] else "")
                kinds.update((path, BlockKind(stack, name)) for path in paths)
        return [Block(path, kinds[path]) for path, _ in found]

    def _walk(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if not self._counts[child_path] or child_path in self._sizes:
                continue
            items = self._find_repeated(child, child_path)
            if not items:
                yield from self._walk(child, child_path)
            for item_path, item in items:
                if self._is_stage(item, item_path):
                    parts = self._find_repeated(item, item_path)
                    yield from parts or self._walk(item, item_path)
                else:
                    yield item_path, item

    def _find_repeated(self, module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
        """Return the blocks in a container; empty for any other module."""
        if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)):
            return []
        items = [(f"{path}.{name}", child) for name, child in module.named_children()]
        items = [(where, child) for where, child in items if self._counts[where] and where not in self._sizes]
        if isinstance(module, torch.nn.ModuleList):
            return items
        return items if len(items) > 1 and len({type(child) for _, child in items}) == 1 else []

    def _is_stage(self, item: nn.Module, path: str) -> bool:
        """Whether a repeated item is a stage that contains the actual blocks, as in hierarchical vision models.

        A stage has over three quarters of its linear layers in one list of blocks of the same class. Lists of
        experts, of small adapters and of the two halves of a block do not count.
        """
        for name, child in item.named_modules():
            inner = f"{path}.{name}".rstrip(".")
            if "expert" in name or self._counts[inner] * 4 <= self._counts[path] * 3:
                continue
            kinds = {type(part) for _, part in self._find_repeated(child, inner)}
            if len(kinds) == 1 and torch.nn.Sequential not in kinds:
                return True
        return False

    def _find_numbered_siblings(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield blocks stored as numbered attributes (``h0``, ``h1``, …) without a container."""
        for path, module in [("", self.model), *self.modules.items()]:
            children = {
                f"{path}.{name}".lstrip("."): child
                for name, child in module.named_children()
                if re.search(r"\d+$", name) and self._counts[f"{path}.{name}".lstrip(".")]
            }
            children = {where: child for where, child in children.items() if where not in self._sizes}
            if len(children) > 1 and len({type(child) for child in children.values()}) == 1:
                yield from children.items()
                return

    def _make_signature(self, path: str) -> frozenset[str]:
        inside = path + "."
        names = [name for name in (*self._sizes, *self.expert_parameters) if name.startswith(inside)]
        return frozenset(collapse(name.removeprefix(inside)) for name in names)


def _read_shape(parameter: object) -> tuple[int, ...]:
    # ZeRO-3 empties the tensor and keeps its shape in `ds_shape`.
    return tuple(getattr(parameter, "ds_shape", None) or parameter.shape)  # type: ignore[attr-defined]


def _count_dimensions(parameter: object) -> int:
    return len(_read_shape(parameter))


def is_expert_stack(path: str, value: object, modules: dict[str, nn.Module]) -> bool:
    """Whether a parameter is the stacked 3-D weight of routed experts.

    Args:
        path: Path of the parameter.
        value: The parameter, on any device; ZeRO-3 may have emptied it.
        modules: Modules of the model by path.
    """
    if _count_dimensions(value) != 3:
        return False
    owner = path.rpartition(".")[0]
    return "expert" in owner.lower() or "expert" in type(modules.get(owner)).__name__.lower()


def is_flat_stack(path: str, value: object, modules: dict[str, nn.Module]) -> bool:
    """Whether a parameter holds the weights of routed experts one below the other, ``[experts * rows, columns]``.

    For the arguments see `is_expert_stack`. Such a weight is that of one matrix for PEFT, and of no backend.
    """
    owner = path.rpartition(".")[0]
    module = modules.get(owner)
    if "expert" not in owner.lower() and "expert" not in type(module).__name__.lower():
        return False
    shape = _read_shape(value)
    counts = [n for name, n in vars(module).items() if "num_experts" in name and isinstance(n, int) and n > 1]
    return len(shape) == 2 and any(shape[0] > count and shape[0] % count == 0 for count in counts)


def _count_beneath(paths: Iterable[str]) -> Counter[str]:
    """Return the number of paths at and beneath every dotted prefix."""
    counts: Counter[str] = Counter()
    for path in paths:
        parts = path.split(".")
        counts.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return counts


def _find_owner(path: str, blocks: dict[str, Block]) -> Block | None:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        block = blocks.get(".".join(parts[:end]))
        if block is not None:
            return block
    return None


def _make_labels(signatures: list[frozenset[str]]) -> dict[frozenset[str], str]:
    """Return a label for each signature: the parts that not all signatures share."""
    if len(signatures) == 1:
        return {signatures[0]: ""}
    shared = frozenset.intersection(*signatures)
    labels = {}
    for number, signature in enumerate(signatures):
        parts = sorted({_name_part(name) for name in signature - shared})
        labels[signature] = ", ".join(parts[:3]) + (", …" if len(parts) > 3 else "") or "plain"
        if list(labels.values()).count(labels[signature]) > 1:
            labels[signature] += f" #{number + 1}"
    return labels


def _name_part(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return owner or leaf
