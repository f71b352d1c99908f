"""Which modules get adapters: the registered default, a scope, names or a pattern, checked against the model."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_plugins.errors import NoTargets, TargetError, TargetWarning, UnevenCoverage, UnknownScope, UnmatchedTargets
from lora_plugins.manager import PluginHost, plugin_host
from lora_plugins.structure import Structure, collapse, is_under, matches

if TYPE_CHECKING:
    from torch import nn

    from lora_plugins.types import Architecture

#: Scopes that every model has, whether or not its architecture is registered.
SCOPES = ("attention", "mlp", "all-linear", "experts", "vision")

#: What a class name says about the task, in PEFT's words; the head is new in all of them.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForMultipleChoice": None,
    "ForImageClassification": None,
    "ForAudioClassification": None,
    "ForVideoClassification": None,
}

_ATTENTION = re.compile(r"attn|attention|query_key_value|(^|[._])[qkv]_(proj|lin)|(^|\.)(mixer|linear_attn|mamba|ssm)")
_ROUTER = re.compile(r"(^|\.)(router|gate|gate_network|shared_expert_gate)(\.|$)")
_VISION = re.compile(r"vision|visual|image_encoder|audio_tower|audio_encoder|speech_encoder")


@dataclass(frozen=True)
class TargetHit:
    """One requested name and the modules that it matched.

    Attributes:
        name: The name as it was asked for or registered.
        modules: Paths of the matched modules.
        shapes: ``"in -> out"`` of each, in the same order.
    """

    name: str
    modules: list[str]
    shapes: list[str]


@dataclass(frozen=True)
class TargetPlan:
    """What PEFT is told, and how it was found.

    Attributes:
        target_modules: Explicit names: short where the short name matches just the wanted modules, else paths.
        target_parameters: Names of stacked expert parameters.
        rank_factors: By how much the rank of such a parameter is multiplied: two projections that are
            stored as one get a decomposition each.
        modules_to_save: Names of new heads, trained and saved whole.
        task_type: The task in PEFT's words, ``None`` where it has no word for it.
        source: Who named the targets.
        hits: The hit table.
        bare: Linear layers without an adapter: path with ``*`` for indices, and how many.
        coverage: For each kind of block, how many have an adapter and how many there are.
        never: Names that stay untouched, by quantization as well.
        vision: Prefixes of encoders that a batch of text does not reach.
        notes: Sentences for the report.
    """

    target_modules: list[str]
    target_parameters: list[str] = field(default_factory=list)
    rank_factors: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    task_type: str | None = None
    source: str = ""
    hits: list[TargetHit] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=dict)
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def resolve_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    experts: str = "default",
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    strict: bool = True,
    host: PluginHost | None = None,
) -> TargetPlan:
    """Choose the modules of a base model that get adapters, and check the choice against the model.

    Args:
        model: A raw base model: live, on the meta device, or quantized.
        target_modules: ``None`` for the registered default; a scope (``"attention"``, ``"mlp"``,
            ``"all-linear"``, ``"experts"``, ``"vision"``, or one of the architecture's own); a list of
            names; or a regular expression for whole paths, as in PEFT.
        experts: ``"none"``, ``"routed"``, ``"shared"``, or ``"default"`` for the architecture's policy.
        exclude_modules: Names, or a regular expression, to leave out.
        layers_to_transform: Indices of the blocks to adapt; all when ``None``.
        strict: Whether unmatched names and uneven coverage are errors; else they are warnings.
        host: Where to look architectures up; default is the process's plugin host.

    Raises:
        UnmatchedTargets: A requested name matches nothing.
        UnevenCoverage: A name is missing in some blocks of a kind.
        NoTargets: Nothing in the model can take an adapter.
        TargetError: An argument has no meaning.
    """
    return _Resolver(model, experts, exclude_modules, layers_to_transform, strict, host or plugin_host()).run(
        target_modules
    )


def task_heads(model: nn.Module, host: PluginHost | None = None) -> list[str]:
    """Names of the heads that a model's class adds to the pretrained part, which must be trained."""
    if not any(type(model).__name__.endswith(task) for task in _TASKS):
        return []
    record = _record(model, host or plugin_host())
    known = record.heads if record is not None else ("score", "classifier", "qa_outputs")
    return list(dict.fromkeys([*_head_children(model), *(name for name in known if name in model._modules)]))


def task_type(model: nn.Module) -> str | None:
    """The task of a model in PEFT's words, from its class; ``None`` where PEFT has no wrapper that fits."""
    name = type(model).__name__
    for suffix, task in _TASKS.items():
        if name.endswith(suffix):
            return task
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        # PEFT's wrappers for language models would pass input_ids to a speech or vision model.
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return None


def _head_children(model: nn.Module) -> list[str]:
    return Structure(model).task_heads()


def _record(model: nn.Module, host: PluginHost) -> Architecture | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return host.architecture(model_type) if isinstance(model_type, str) else None


class _Resolver:
    def __init__(
        self,
        model: nn.Module,
        experts: str,
        exclude: str | Sequence[str] | None,
        layers: int | Sequence[int] | None,
        strict: bool,
        host: PluginHost,
    ) -> None:
        if experts not in ("default", "none", "routed", "shared"):
            raise TargetError(f"experts must be 'default', 'none', 'routed' or 'shared', not {experts!r}")
        self.model = model
        self.structure = Structure(model)
        self.record = _record(model, host)
        self.policy = experts if experts != "default" else (self.record.expert_policy if self.record else "none")
        self.exclude = exclude
        self.layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        self.strict = strict
        self.heads = task_heads(model, host)
        self.never = tuple(self.record.never) if self.record else ()
        self.vision = tuple(self.record.vision) if self.record else ()
        self.notes: list[str] = []

    def run(self, wanted: str | Sequence[str] | None) -> TargetPlan:
        hits, source = self._hits(wanted)
        parameters = self._expert_parameters(wanted)
        paths = list(dict.fromkeys(path for hit in hits for path in hit.modules))
        if not paths and not parameters:
            raise NoTargets(
                f"Nothing in {type(self.model).__name__} can take an adapter for target_modules={wanted!r}. "
                f"Its linear layers: {', '.join(self._patterns(8)) or 'none'}."
            )
        self._check_even(hits)
        self._note_uncovered(hits, parameters)
        factors = {name: 2 for name in parameters if name.rpartition(".")[2] == "gate_up_proj"}
        return TargetPlan(
            target_modules=self._names_for_peft(paths),
            target_parameters=parameters,
            rank_factors=factors,
            modules_to_save=self.heads,
            task_type=task_type(self.model),
            source=source,
            hits=hits,
            bare=self._bare(set(paths)),
            coverage=self._coverage(paths),
            never=self.never,
            vision=self.vision,
            notes=self.notes,
        )

    # -- what was asked for --------------------------------------------------------------------

    def _hits(self, wanted: str | Sequence[str] | None) -> tuple[list[TargetHit], str]:
        if wanted is None:
            return self._default()
        if isinstance(wanted, str):
            names = self._scope(wanted)
            if names is not None:
                return names, f"scope {wanted!r}"
            return self._by_pattern(wanted), "the pattern given"
        requested = list(dict.fromkeys(wanted))
        return self._by_names(requested, asked=True), "the names given"

    def _default(self) -> tuple[list[TargetHit], str]:
        if self.record is not None:
            hits = self._by_names(list(self.record.targets), asked=False)
            missing = [name for name in self.record.targets if name not in {hit.name for hit in hits}]
            if not hits:
                # None of them fits: the error names them all.
                self._by_names(missing, asked=True)
            if missing:
                self.notes.append(
                    f"the architecture's record also names {', '.join(missing)}, which is not in this model"
                )
            return hits, f"the registered architecture {self.record.model_type!r}"
        attention = [path for path in self._candidates() if _ATTENTION.search(self._inside_block(path))]
        chosen = attention or self._candidates()
        what = "attention layers" if attention else "linear layers, as no attention was recognised"
        self.notes.append(
            f"{type(self.model).__name__} is not registered: its structure was read, and all {len(chosen)} {what} "
            f"in {len(self.structure.blocks)} blocks were chosen"
        )
        return self._grouped(chosen), "the model's structure"

    def _scope(self, name: str) -> list[TargetHit] | None:
        own = dict(self.record.scopes) if self.record else {}
        if name in own and name != "all-linear":
            return self._by_names(list(own[name]), asked=True)
        if name == "all-linear":
            return self._grouped(self._candidates())
        if name == "attention":
            return self._grouped([p for p in self._candidates() if _ATTENTION.search(self._inside_block(p))])
        if name == "mlp":
            return self._grouped([p for p in self._candidates() if not _ATTENTION.search(self._inside_block(p))])
        if name == "vision":
            return self._grouped([p for p in self.structure.linears if self._is_vision(p)])
        if name == "experts":
            self.policy = "routed" if self.policy == "none" else self.policy
            return self._grouped([p for p in self._candidates() if "expert" in p.lower()])
        if re.fullmatch(r"[\w-]+", name) and not self._by_regex(name):
            known = sorted({*SCOPES, *own})
            near = difflib.get_close_matches(name, [*known, *self._leaves()], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownScope(
                f"target_modules={name!r} is no scope and, read as a pattern for whole paths, matches nothing.{hint} "
                f"Scopes: {', '.join(known)}. For a module name write [{name!r}]."
            )
        return None

    def _by_pattern(self, pattern: str) -> list[TargetHit]:
        found = self._by_regex(pattern)
        if not found:
            self._problem(UnmatchedTargets, f"The pattern {pattern!r} matches no module. " + self._what_there_is())
        return self._kept({pattern: found})

    def _by_regex(self, pattern: str) -> list[str]:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise TargetError(f"target_modules={pattern!r} is no regular expression: {error}") from None
        return [path for path in self._adaptable() if compiled.fullmatch(path)]

    def _by_names(self, names: Iterable[str], *, asked: bool) -> list[TargetHit]:
        adaptable = self._adaptable()
        found = {name: [path for path in adaptable if matches(path, name)] for name in names}
        missing = [name for name, paths in found.items() if not paths]
        if missing and asked:
            leaves = self._leaves()
            near = [
                f"{name!r} (near: {', '.join(difflib.get_close_matches(name, leaves, n=3, cutoff=0.5)) or 'nothing'})"
                for name in missing
            ]
            self._problem(UnmatchedTargets, f"No module is called {', '.join(near)}. " + self._what_there_is())
        return self._kept(found)

    def _kept(self, found: dict[str, list[str]]) -> list[TargetHit]:
        """The hits without what exclude_modules and layers_to_transform leave out."""
        kept = {name: [path for path in paths if not self._left_out(path)] for name, paths in found.items()}
        return [self._hit(name, paths) for name, paths in kept.items() if paths]

    # -- what there is -------------------------------------------------------------------------

    def _adaptable(self) -> list[str]:
        """Paths that a name may mean: linear layers, and what else PEFT wraps, outside encoders and heads."""
        from torch import nn

        others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return [
            path
            for path, module in self.structure.modules.items()
            if (path in self.structure.linears or isinstance(module, others))
            and not self._is_vision(path)
            and not is_under(path, self.heads)
        ]

    def _candidates(self) -> list[str]:
        """Linear layers inside the blocks that a scope may take: no routers, heads, encoders, routed experts."""
        return [
            path
            for path, linear in self.structure.linears.items()
            if linear.block is not None
            and path not in self.structure.output_heads
            and not is_under(path, [*self.never, *self.heads])
            and not _ROUTER.search(self._inside_block(path))
            and not self._is_vision(path)
            and not self._left_out(path)
            and self._expert_allowed(path)
            and not self._read_raw(path)
        ]

    def _read_raw(self, path: str) -> bool:
        """Whether this is a layer of a state-space mixer whose bare weight is read: an adapter would do nothing.

        ``dt_proj`` is multiplied by hand, ``out_proj`` inside the fused kernel; PEFT refuses the latter.
        """
        owner, _, name = path.rpartition(".")
        return name in ("dt_proj", "out_proj") and f"{owner}.conv1d" in self.structure.modules

    def _is_vision(self, path: str) -> bool:
        if self.record is not None and (self.record.vision or self.record.text):
            return is_under(path, self.record.vision)
        # A model that is an encoder as a whole has its blocks under such a name and nothing else.
        return bool(_VISION.search(path)) and any(not _VISION.search(other) for other in self._block_stacks)

    @property
    def _block_stacks(self) -> set[str]:
        return {block.kind.stack for block in self.structure.blocks}

    def _left_out(self, path: str) -> bool:
        if self.layers is not None:
            block = self.structure.linears[path].block if path in self.structure.linears else None
            if block is None or int(re.findall(r"\d+", block.path)[-1]) not in self.layers:
                return True
        if isinstance(self.exclude, str):
            return re.fullmatch(self.exclude, path) is not None
        return any(matches(path, name) for name in self.exclude or ())

    def _expert_allowed(self, path: str) -> bool:
        inside = self._inside_block(path)
        if not re.search(r"(^|\.)experts(\.|$)", inside):
            return True
        return self.policy == "routed"

    def _expert_parameters(self, wanted: str | Sequence[str] | None) -> list[str]:
        """Stacked expert weights, by their short names, when the policy has them adapted."""
        if self.policy != "routed" or (wanted is not None and wanted not in ("experts", "all-linear")):
            return []
        names = [".".join(path.split(".")[-2:]) for path in self.structure.expert_parameters]
        return list(dict.fromkeys(name for name in names if not name.endswith("bias")))

    def _inside_block(self, path: str) -> str:
        linear = self.structure.linears.get(path)
        return path.removeprefix(linear.block.path + ".") if linear is not None and linear.block else path

    def _leaves(self) -> list[str]:
        return sorted({path.rpartition(".")[2] for path in self.structure.linears})

    def _patterns(self, limit: int) -> list[str]:
        return list(dict.fromkeys(linear.pattern for linear in self.structure.linears.values()))[:limit]

    def _what_there_is(self) -> str:
        return f"Linear layers of {type(self.model).__name__}: {', '.join(self._leaves()[:20]) or 'none'}."

    # -- the result ----------------------------------------------------------------------------

    def _hit(self, name: str, paths: list[str]) -> TargetHit:
        return TargetHit(name, paths, [self._shape(path) for path in paths])

    def _shape(self, path: str) -> str:
        linear = self.structure.linears.get(path)
        if linear is None:
            return type(self.structure.modules[path]).__name__
        return f"{linear.in_features} -> {linear.out_features}"

    def _grouped(self, paths: list[str]) -> list[TargetHit]:
        """One hit for each different name inside the blocks."""
        groups: dict[str, list[str]] = {}
        for path in paths:
            groups.setdefault(path.rpartition(".")[2], []).append(path)
        return [self._hit(name, members) for name, members in groups.items()]

    def _names_for_peft(self, paths: list[str]) -> list[str]:
        """Short names where each matches nothing else, so that the saved configuration stays readable."""
        wanted = set(paths)
        short = {path.rpartition(".")[2] for path in paths}
        clean = {name for name in short if all(p in wanted for p in self.structure.modules if matches(p, name))}
        return sorted({p.rpartition(".")[2] if p.rpartition(".")[2] in clean else p for p in paths})

    def _bare(self, adapted: set[str]) -> dict[str, int]:
        counts = Counter(linear.pattern for path, linear in self.structure.linears.items() if path not in adapted)
        return dict(counts)

    def _coverage(self, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
        hit = {block for path in paths if (block := self.structure.block_of(path)) is not None}
        hit_kinds = Counter(block.kind for block in hit)
        return {str(kind): (hit_kinds[kind], total) for kind, total in self.structure.kinds.items()}

    def _check_even(self, hits: list[TargetHit]) -> None:
        """Refuse a name that occurs in every block of a kind and was taken in some of them only."""
        if self.layers is not None or self.exclude is not None:
            return
        for hit in hits:
            taken = Counter(block.kind for p in hit.modules if (block := self.structure.block_of(p)) is not None)
            for kind, count in taken.items():
                per_block = self._per_block(hit, kind)
                total = self.structure.kinds[kind]
                if per_block < total:
                    self._problem(
                        UnevenCoverage,
                        f"{hit.name!r} reaches {per_block} of the {total} blocks of kind {kind} ({count} modules). "
                        "Name what the other blocks call it, or set layers_to_transform.",
                    )

    def _note_uncovered(self, hits: list[TargetHit], parameters: list[str]) -> None:
        """Say which kinds of blocks stay without an adapter, and how much the experts hold."""
        coverage = self._coverage(path for hit in hits for path in hit.modules)
        for kind, (count, total) in coverage.items():
            if not count and not parameters and not self._is_vision(kind.partition(" in ")[2]):
                self.notes.append(f"none of the {total} blocks of kind {kind} has an adapter")
        if self.structure.expert_parameters and not parameters:
            share = self.structure.expert_share()
            self.notes.append(
                f"routed experts hold {share:.1%} of the weights and get no adapter (experts={self.policy!r}); "
                "experts='routed' adapts them"
            )

    def _per_block(self, hit: TargetHit, kind: object) -> int:
        blocks = {b.path for p in hit.modules if (b := self.structure.block_of(p)) is not None and b.kind == kind}
        return len(blocks)

    def _problem(self, error: type[TargetError], message: str) -> None:
        if self.strict:
            raise error(message)
        warnings.warn(message, TargetWarning, stacklevel=2)
        self.notes.append(message)


__all__ = ["SCOPES", "TargetHit", "TargetPlan", "collapse", "resolve_targets", "task_heads", "task_type"]
