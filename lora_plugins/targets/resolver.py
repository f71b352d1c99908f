"""Resolve one request for target modules on one model."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_plugins.errors import (
    ForbiddenTargets,
    NoTargets,
    TargetError,
    TargetWarning,
    UnevenCoverage,
    UnknownScope,
    UnmatchedTargets,
)
from lora_plugins.models.structure import BlockKind, Structure, is_under, matches
from lora_plugins.plugins.host import PluginHost
from lora_plugins.targets.architectures import explain_registered, explain_structure, find_record
from lora_plugins.targets.candidates import SCOPES, Candidates, list_left_out
from lora_plugins.targets.check import check_fields
from lora_plugins.targets.heads import choose_heads, choose_tokens
from lora_plugins.targets.peft_names import rewritten_names, shortest_names
from lora_plugins.targets.records import TargetHit, TargetPlan
from lora_plugins.targets.tasks import PEFT_HEADS, task_type
from lora_plugins.targets.written import keep_written, resolve_tables
from lora_plugins.text import did_you_mean, find_near, show_near

__all__ = ["Resolver"]


#: Share of the weights from which routed experts without an adapter are worth a warning.
_MANY_EXPERTS = 0.1

#: Sources of targets that the user wrote.
_NAMES, _PATTERN = "the names given", "the pattern given"


def _list_paths(hits: Iterable[TargetHit]) -> list[str]:
    return list(dict.fromkeys(path for hit in hits for path in hit.modules))


class Resolver:
    """Resolves one request on one model; see `lora_plugins.targets.resolution.resolve_targets` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        asked: Mapping[str, Any],
        experts: str,
        frozen: Sequence[str],
        strict: bool,
        host: PluginHost,
    ) -> None:
        if experts not in ("default", "none", "routed", "shared"):
            raise TargetError(f"experts must be 'default', 'none', 'routed' or 'shared', not {experts!r}")
        self.model = model
        self.asked = asked
        self.frozen = tuple(frozen)
        self.structure = Structure(model)
        self.record = find_record(model, host)
        self.heads = choose_heads(self.structure, self.record, self.frozen)
        layers, exclude = asked.get("layers_to_transform"), asked.get("exclude_modules")
        chosen_layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        own = asked.get("_custom_modules") or ()
        self.candidates = Candidates(self.structure, self.record, self.heads.modules, exclude, chosen_layers, own)
        self.partial = exclude is not None or layers is not None
        self.asked_experts = experts
        self.policy = experts if experts != "default" else (self.record.expert_policy if self.record else "none")
        self.strict = strict
        self.host = host
        self.notes: list[str] = [self.heads.required.note]
        self.named: set[str] = set()

    def run(self) -> TargetPlan:
        """Choose the modules, check the choice, and return the plan for PEFT."""
        wanted = self._read_wanted()
        hits, source = self._find_hits(wanted)
        expert_layers, expert_parameters = self._find_experts(wanted)
        module_hits = [*hits, *expert_layers]
        named_parameters = self._find_parameters(self.asked.get("target_parameters") or ())
        parameter_hits = [*expert_parameters, *named_parameters]
        modules, parameters = _list_paths(module_hits), _list_paths(parameter_hits)
        self._check_fields([*modules, *parameters] or self.candidates.adaptable)
        if not modules and not parameters:
            raise NoTargets(
                f"Nothing in {type(self.model).__name__} can take an adapter for target_modules={wanted!r}. "
                f"Its linear layers: {', '.join(self._list_patterns(8)) or 'none'}.{self._make_experts_hint()}"
            )
        self._check_even([*module_hits, *parameter_hits])
        self._check_covered(wanted, [*modules, *parameters])
        self._check_experts(wanted, [*modules, *parameters])
        self._note_heads()
        names, as_parameters = self._choose_names(modules)
        by_policy = [path for path in _list_paths(expert_parameters) if path not in _list_paths(named_parameters)]
        fused = shortest_names(by_policy, self.structure.parameters, parts=2)
        doubled = {name: 2 for name in fused if name.rpartition(".")[2] == "gate_up_proj"}
        # The saved configuration keeps the names that the user wrote.
        told = [*(hit.name for hit in named_parameters), *fused, *as_parameters]
        plan = self._make_plan(names, told, doubled, source, module_hits, parameter_hits)
        as_written = source in (_NAMES, _PATTERN) and not (expert_layers or as_parameters)
        plan.fields.update(self._make_fields(plan, modules, as_written=as_written))
        return plan

    def _read_wanted(self) -> str | list[str] | None:
        """Return the requested modules; parameters alone bring no default modules, as in PEFT."""
        wanted = self.asked.get("target_modules")
        if wanted is None:
            return [] if self.asked.get("target_parameters") else None
        return wanted if isinstance(wanted, str) else list(wanted)

    def read(self) -> TargetPlan:
        """Return the plan of a stored adapter: the modules that PEFT finds by its names, unchanged."""
        names, parameters = self.asked.get("target_modules") or (), self.asked.get("target_parameters") or ()
        found: dict[str, list[str]] = {}
        for name in [names] if isinstance(names, str) else names:
            by_name = [path for path in self.candidates.adaptable if matches(path, name)]
            found[name] = self.candidates.by_regex(name) if isinstance(names, str) else by_name
        self._check_missing(found)
        hits = self._keep_asked(found)
        stored = [names] if isinstance(names, str) else list(names)
        parameter_hits = self._find_parameters(parameters)
        adapted = [*_list_paths(hits), *_list_paths(parameter_hits)]
        self._check_fields(adapted)
        plan = self._make_plan(stored, list(parameters), {}, "the stored adapter", hits, parameter_hits)
        if keep_written(self.asked, (), list(self.structure.modules), ()) is None and isinstance(names, str):
            explicit = shortest_names(_list_paths(hits), self.structure.modules)
            plan.fields.update(target_modules=set(explicit), exclude_modules=None)
        plan.fields.update(resolve_tables(self.asked, adapted))
        return plan

    def _make_fields(self, plan: TargetPlan, modules: list[str], *, as_written: bool) -> dict[str, Any]:
        """Return the configuration's fields for PEFT, as the user wrote them where PEFT reads them the same way."""
        saved = list(dict.fromkeys([*(self.asked.get("modules_to_save") or ()), *plan.modules_to_save]))
        paths = list(self.structure.modules)
        written = keep_written(self.asked, modules, paths, saved) if as_written else None
        explicit = {
            "target_modules": set(plan.target_modules),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        fields = {**(written or explicit), **resolve_tables(self.asked, [*modules, *self.structure.parameters])}
        if plan.target_parameters:
            fields["target_parameters"] = list(plan.target_parameters)
        tokens, whole = choose_tokens(self.structure, self.heads.found.grown, self.asked, modules, self.frozen)
        fields["modules_to_save"] = [*saved, *whole] or None
        if tokens is not None:
            fields["trainable_token_indices"] = tokens
        new = [*(f"{name}: {len(rows)}" for name, rows in (tokens or {}).items()), *whole]
        if new:
            grown = any(item.now > item.before for item in self.heads.found.grown)
            why = "the vocabulary has grown since the checkpoint" if grown else "the tokenizer has tokens that are new"
            self.notes.append(f"{why}: new rows are trained ({', '.join(new)})")
        return fields

    def _check_fields(self, adapted: Sequence[str]) -> None:
        """Check the fields that do not choose modules, or only leave some out."""
        asked = {k: v for k, v in self.asked.items() if k not in ("target_modules", "target_parameters")}
        try:
            check_fields(self.model, asked, adapted)
        except UnmatchedTargets as error:
            self._report(UnmatchedTargets, str(error))

    def _make_plan(
        self,
        names: list[str],
        parameters: list[str],
        rank_factors: dict[str, int],
        source: str,
        module_hits: list[TargetHit],
        parameter_hits: list[TargetHit],
    ) -> TargetPlan:
        # A layer that is adapted through its bare weight must keep a float weight.
        float_only = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
        adapted, saved = {*_list_paths([*module_hits, *parameter_hits])}, self.asked.get("modules_to_save") or ()
        return TargetPlan(
            target_modules=names,
            target_parameters=parameters,
            rank_factors=rank_factors,
            modules_to_save=self._list_saved_heads(),
            task_type=self._choose_task_type(),
            source=source,
            hits=[*module_hits, *parameter_hits],
            bare=self._count_bare(set(_list_paths(module_hits))),
            left_out=list_left_out(self.candidates, adapted, self.named, source, self.policy, saved),
            coverage=self._count_coverage(adapted),
            never=(*self.candidates.never, *float_only),
            unreached=self.candidates.unreached(),
            input_gradients=self.record is not None and self.record.input_gradients,
            required=self.heads.required,
            notes=self.notes,
        )

    def _list_saved_heads(self) -> list[str]:
        """Return the names of the heads that the user's ``modules_to_save`` does not cover."""
        asked = self.asked.get("modules_to_save") or ()
        left = [path for path in self.heads.modules if not is_under(path, asked)]
        return [name for name in self.heads.names if any(path.endswith(name) for path in left)]

    def _choose_task_type(self) -> str | None:
        """Return PEFT's task type, unless PEFT's wrapper for it would train a head that stays frozen."""
        task = task_type(self.model)
        frozen = [name for name in PEFT_HEADS.get(task or "", ()) if is_under(name, self.frozen)]
        return None if any(name in self.structure.modules for name in frozen) else task

    # -- what was asked for --------------------------------------------------------------------

    def _find_hits(self, wanted: str | Sequence[str] | None) -> tuple[list[TargetHit], str]:
        if wanted is None:
            return self._choose_default()
        if isinstance(wanted, str):
            names = self._read_scope(wanted)
            if names is not None:
                return names, f"scope {wanted!r}"
            return self._find_by_pattern(wanted), _PATTERN
        return self._find_by_names(list(dict.fromkeys(wanted))), _NAMES

    def _choose_default(self) -> tuple[list[TargetHit], str]:
        if self.record is not None:
            hits = self._find_by_record(self.record.targets)
            if hits:
                self.notes.append(explain_registered(self.model, self.record, [hit.name for hit in hits], self.host))
                return hits, f"the registered architecture {self.record.model_type!r}"
            why = (
                f"the record of {self.record.model_type!r} names {', '.join(self.record.targets)}, none of which is in "
                f"{type(self.model).__name__}"
            )
        else:
            why = f"{type(self.model).__name__} is not registered"
        available = self.candidates.linear
        attention = [path for path in available if self.candidates.is_attention(path)]
        chosen = attention or available
        what = "attention layers" if attention else "linear layers, as no attention was recognised"
        self.notes.append(explain_structure(why, f"{len(chosen)} {what}", len(self.structure.blocks)))
        return self._group(chosen), "the model's structure"

    def _read_scope(self, name: str) -> list[TargetHit] | None:
        own = dict(self.record.scopes) if self.record else {}
        built_in: dict[str, Callable[[], list[str]]] = {
            "all-linear": lambda: self.candidates.linear or self.candidates.outside_blocks(),
            "attention": lambda: [p for p in self.candidates.linear if self.candidates.is_attention(p)],
            "mlp": lambda: [p for p in self.candidates.linear if not self.candidates.is_attention(p)],
            "vision": self.candidates.encoders,
            "experts": list,
        }
        if name in own and name not in ("all-linear", "experts"):
            return self._find_by_record(own[name])
        if name in built_in:
            return self._group(built_in[name]())
        if re.fullmatch(r"[\w-]+", name) and not self.candidates.by_regex(name):
            known = sorted({*SCOPES, *own})
            hint = did_you_mean(name, [*known, *self._list_leaves()])
            raise UnknownScope(
                f"target_modules={name!r} is not a scope and, read as a pattern for whole paths, matches "
                f"nothing.{hint} Scopes: {', '.join(known)}. For a module name write [{name!r}]."
            )
        return None

    def _find_by_pattern(self, pattern: str) -> list[TargetHit]:
        found = self.candidates.by_regex(pattern)
        if not found:
            self._report(UnmatchedTargets, f"The pattern {pattern!r} matches no module. " + self._show_layers())
        return self._keep_asked({pattern: self._keep_permitted(pattern, found)})

    def _find_by_record(self, names: Sequence[str]) -> list[TargetHit]:
        """Find a record's names; it covers all variants of a model type, so a name may be absent."""
        return self._keep_asked({name: self.candidates.registered(name) for name in names})

    def _find_by_names(self, names: Sequence[str]) -> list[TargetHit]:
        found = {name: self.candidates.named(name) for name in names}
        self._check_missing(found)
        for name, paths in found.items():
            self._note_encoders(name, paths)
        return self._keep_asked({name: self._keep_permitted(name, paths) for name, paths in found.items()})

    def _check_missing(self, found: dict[str, list[str]]) -> None:
        missing = [name for name, paths in found.items() if not paths]
        if missing:
            self._report(
                UnmatchedTargets,
                f"No module that can take an adapter is called {', '.join(map(self._show_near, missing))}. "
                + self._show_layers(),
            )

    def _find_parameters(self, names: Sequence[str]) -> list[TargetHit]:
        """Find the parameters that were named one by one."""
        found = {name: [path for path in self.structure.parameters if matches(path, name)] for name in names}
        missing = [name for name, paths in found.items() if not paths]
        if missing:
            self._report(UnmatchedTargets, f"No parameter is called {', '.join(map(repr, missing))}.")
        return [self._make_hit(name, paths) for name, paths in found.items() if paths]

    def _show_near(self, name: str) -> str:
        stacked = [path for path in self.structure.expert_parameters if path.endswith("." + name)]
        if stacked:
            return f"{name!r} (it is a stacked expert parameter: experts='routed' adapts it)"
        existing = [path for path in self.structure.modules if matches(path, name)]
        if existing:
            return f"{name!r} ({self._explain_refusal(existing[0])})"
        return show_near(name, find_near(name, self._list_leaves(), most=3, cutoff=0.5))

    def _explain_refusal(self, path: str) -> str:
        if is_under(path, self.heads.modules):
            return "a head, which is trained whole, without an adapter"
        return f"a {type(self.structure.modules[path]).__name__}, which takes no adapter"

    def _keep_permitted(self, name: str, paths: list[str]) -> list[str]:
        """Return the paths that may get an adapter.

        Raises:
            ForbiddenTargets: None of them may.
        """
        allowed = [path for path in paths if not self.candidates.is_forbidden(path)]
        if paths and not allowed:
            raise ForbiddenTargets(
                f"{name!r} means {len(paths)} modules, such as {paths[0]}, that must not get an adapter: their weight "
                "is read without calling them, or the architecture's record lists them under `never`."
            )
        if len(allowed) < len(paths):
            self.notes.append(f"{name!r} also means {len(paths) - len(allowed)} modules that must not get an adapter")
        return allowed

    def _note_encoders(self, name: str, taken: list[str]) -> None:
        left = sum(path.endswith("." + name) for path in self.candidates.adaptable) - len(taken)
        if left > 0:
            self.notes.append(
                f"{name!r} is also the name of {left} modules in encoders beside the language model, which get no "
                "adapter; the scope 'vision' or a longer name reaches them"
            )

    def _keep_asked(self, found: dict[str, list[str]]) -> list[TargetHit]:
        """Return the hits without what exclude_modules and layers_to_transform leave out."""
        self.named |= {path for paths in found.values() for path in paths}
        kept = {name: [p for p in paths if not self.candidates.left_out(p)] for name, paths in found.items()}
        return [self._make_hit(name, paths) for name, paths in kept.items() if paths]

    # -- experts -------------------------------------------------------------------------------

    def _find_experts(self, wanted: str | Sequence[str] | None) -> tuple[list[TargetHit], list[TargetHit]]:
        """Find the experts that the policy selects: layers, and stacked parameters."""
        policy = "routed" if wanted == "experts" and self.policy == "none" else self.policy
        named = self.asked_experts == "default" and wanted not in (None, "experts", "all-linear")
        if policy == "none" or named:
            return [], []
        layers = self.candidates.shared_experts() if policy == "shared" else self.candidates.routed_layers()
        parameters = self.candidates.routed_parameters() if policy == "routed" else []
        if not layers and not parameters:
            self._report(UnmatchedTargets, self._explain_no_experts(policy))
        return self._group(layers), self._group(parameters)

    def _explain_no_experts(self, policy: str) -> str:
        name = type(self.model).__name__
        flat = self.structure.flat_experts
        if policy == "routed" and flat:
            return (
                f"experts='routed': the routed experts of {name} are rows of one matrix ({flat[0]} and others), of "
                "which no expert alone can get an adapter. Without experts= the rest of the model does."
            )
        return f"experts={policy!r}, and {name} has no {policy} experts."

    def _make_experts_hint(self) -> str:
        if not self.candidates.routed_parameters():
            return ""
        return " Its routed experts are stacked parameters: the scope 'experts' or experts='routed' adapts them."

    def _check_experts(self, wanted: str | Sequence[str] | None, taken: list[str]) -> None:
        """Note the share of weights in routed experts without adapter; warn if the user asked for all layers."""
        if set(self.candidates.routed_parameters()) <= set(taken):
            return
        share = self.structure.expert_share()
        text = (
            f"routed experts hold {share:.1%} of the weights and get no adapter (experts={self.policy!r}); "
            "experts='routed' adapts them"
        )
        if wanted == "all-linear" and self.asked_experts == "default" and share > _MANY_EXPERTS:
            warnings.warn(
                f"target_modules='all-linear' reaches linear layers only: {text}, "
                "experts='none' says that this is meant.",
                TargetWarning,
                stacklevel=2,
            )
        self.notes.append(text)

    # -- the result ----------------------------------------------------------------------------

    def _list_leaves(self) -> list[str]:
        return sorted({path.rpartition(".")[2] for path in self.structure.linears})

    def _list_patterns(self, limit: int) -> list[str]:
        return list(dict.fromkeys(linear.pattern for linear in self.structure.linears.values()))[:limit]

    def _show_layers(self) -> str:
        return f"Linear layers of {type(self.model).__name__}: {', '.join(self._list_leaves()[:20]) or 'none'}."

    def _make_hit(self, name: str, paths: list[str]) -> TargetHit:
        return TargetHit(name, paths, [self._show_shape(path) for path in paths])

    def _show_shape(self, path: str) -> str:
        linear = self.structure.linears.get(path)
        if linear is not None:
            return f"{linear.in_features} -> {linear.out_features}"
        if path in self.structure.modules:
            return type(self.structure.modules[path]).__name__
        value = self.structure.parameters[path]
        return " x ".join(str(size) for size in getattr(value, "ds_shape", value.shape))

    def _group(self, paths: list[str]) -> list[TargetHit]:
        """Return one hit for each different name, without what is left out."""
        groups: dict[str, list[str]] = {}
        for path in paths:
            groups.setdefault(path.rpartition(".")[2], []).append(path)
        return self._keep_asked(groups)

    def _choose_names(self, paths: list[str]) -> tuple[list[str], list[str]]:
        """Return names of modules, and of weights where PEFT would read a module's name as something else."""
        names = shortest_names(paths, self.structure.modules)
        rewritten = rewritten_names(self.model, names)
        if not rewritten:
            return names, []
        self.notes.append(
            f"PEFT reads {', '.join(sorted({name.rpartition('.')[2] for name in rewritten}))} in this model as routed "
            f"experts; these {len(rewritten)} names are adapted as parameters, without dropout, and stay in float"
        )
        return [name for name in names if name not in rewritten], [f"{name}.weight" for name in sorted(rewritten)]

    def _note_heads(self) -> None:
        for head in self.heads.names:
            alike = [p for p in self.structure.modules if p != head and p.endswith(head)]
            alike = [path for path in alike if not path.startswith(head + ".")]
            if alike:
                self.notes.append(f"with the head {head!r} PEFT also trains and saves {', '.join(alike)}, named alike")

    def _count_bare(self, adapted: set[str]) -> dict[str, int]:
        counts = Counter(linear.pattern for path, linear in self.structure.linears.items() if path not in adapted)
        return dict(counts)

    def _count_coverage(self, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
        hit = self._count_blocks(paths)
        return {str(kind): (hit[kind], total) for kind, total in self.structure.kinds.items()}

    def _count_blocks(self, paths: Iterable[str]) -> Counter[BlockKind]:
        blocks = {block for path in paths if (block := self.structure.block_of(path)) is not None}
        return Counter(block.kind for block in blocks)

    def _check_even(self, hits: list[TargetHit]) -> None:
        """Refuse a name that was taken in some blocks of a kind and not in others."""
        if self.partial:
            return
        for name, modules in self._join_numbered(hits):
            for kind, count in self._count_blocks(modules).items():
                total = self.structure.kinds[kind]
                if count < total:
                    self._report(
                        UnevenCoverage,
                        f"{name!r} reaches {count} of the {total} blocks of kind {kind} ({len(modules)} modules). Name "
                        "what the other blocks call it, set layers_to_transform, or pass strict=False if only these "
                        "blocks are meant.",
                    )

    def _join_numbered(self, hits: list[TargetHit]) -> Iterable[tuple[str, list[str]]]:
        """Return each wish's name and modules; names that differ in a block's number only are one wish."""
        wishes: dict[str, tuple[str, list[str]]] = {}
        for name, path in [(hit.name, path) for hit in hits for path in hit.modules]:
            key = self.structure.inside_block(path) if self._names_block(name, path) else name
            wishes.setdefault(key, (name, []))[1].append(path)
        return wishes.values()

    def _names_block(self, name: str, path: str) -> bool:
        """Whether a name contains the number of the path's block."""
        block = self.structure.block_of(path)
        if block is None or not matches(path, name):
            return False
        return len(name) >= len(path) - len(block.path.rpartition(".")[0]) - 1

    def _check_covered(self, wanted: str | Sequence[str] | None, paths: list[str]) -> None:
        """Note which kinds of blocks have no adapter; warn if the user's names leave out part of a stack."""
        hit = self._count_blocks(paths)
        stacks = {kind.stack for kind in hit}
        for kind, total in self.structure.kinds.items():
            if hit[kind] or self.candidates.is_encoder(kind.stack) or self.candidates.is_forbidden(kind.stack):
                continue
            text = f"none of the {total} blocks of kind {kind} has an adapter"
            self.notes.append(text)
            if kind.stack in stacks and not isinstance(wanted, str) and not self.partial:
                warnings.warn(f"{text}; other blocks of the same stack have.", TargetWarning, stacklevel=2)

    def _report(self, error: type[TargetError], message: str) -> None:
        if self.strict:
            raise error(message)
        warnings.warn(message, TargetWarning, stacklevel=2)
        self.notes.append(message)
