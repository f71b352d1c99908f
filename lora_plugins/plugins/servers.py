"""The records of inference servers: what of an adapter each one takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AdapterTraits", "Server", "ServerRule", "ServingVerdict"]


@dataclass(frozen=True, slots=True)
class AdapterTraits:
    """What servers ask of an adapter.

    Attributes:
        model_type: ``model_type`` of the base's text model; ``None`` if the base is not known.
        rank: The largest rank of its layers.
        modules: Last parts of the names of the adapted modules, sorted.
        modules_to_save: Names of the modules that are saved in full.
        bias: PEFT's ``bias``: ``"none"``, ``"all"`` or ``"lora_only"``.
        init: PEFT's ``init_lora_weights``.
        changes_base: Whether that initialization changed the base's weights; the file is relative to the changed ones.
        use_dora: Whether it is DoRA.
        use_rslora: Whether its scale is ``alpha / sqrt(r)``.
        lora_bias: Whether B has a bias.
        patterns: Whether ranks or scales differ between its modules.
        experts: Whether stacked experts are adapted as parameters.
        embeddings: Names of adapted input embeddings.
        whole_weights: Embeddings and heads that its file holds whole and without an adapter, as PEFT saves those of a
            grown vocabulary.
        shared_head: Whether the output head shares the input embedding's weight; ``None`` if the base is not known.
        trained_tokens: Whether single rows of the embeddings are trained.
        replicated: Whether it replicates layers.
        some_layers: Whether only some of the layers are adapted.
        listed: Whether its targets are names, not one regular expression.
        variants: Further fields of PEFT's configuration that change the computation, such as ``"kasa_config"``.
    """

    model_type: str | None = None
    rank: int = 8
    modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    init: bool | str = True
    changes_base: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    patterns: bool = False
    experts: bool = False
    embeddings: tuple[str, ...] = ()
    whole_weights: tuple[str, ...] = ()
    shared_head: bool | None = None
    trained_tokens: bool = False
    replicated: bool = False
    some_layers: bool = False
    listed: bool = True
    variants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerRule:
    """One thing that a server does not take.

    Attributes:
        name: Short name, such as ``"dora"``.
        source: File of the server that says so.
        check: Called with the traits; returns what the server does with such an adapter, ``None`` if the rule does not
            concern it.
    """

    name: str
    source: str
    check: Callable[[AdapterTraits], str | None]


@dataclass(frozen=True, slots=True)
class ServingVerdict:
    """Whether a server takes an adapter.

    Attributes:
        server: Name of the server.
        version: Release whose source the rules were read from.
        reasons: Why not, each with the file that says so; empty if it takes the adapter.
        not_known: What the rules leave open.
    """

    server: str
    version: str
    reasons: tuple[str, ...]
    not_known: tuple[str, ...] = ()

    @property
    def served(self) -> bool:
        """Whether no rule speaks against it."""
        return not self.reasons

    def __str__(self) -> str:
        if self.reasons:
            return f"{self.server} ({self.version}) does not serve it: {'; '.join(self.reasons)}"
        left = f"; not known: {', '.join(self.not_known)}" if self.not_known else ""
        return f"{self.server} ({self.version}) serves it{left}"


@dataclass(frozen=True, slots=True)
class Server:
    """An inference server, as `register_servers` returns it.

    Attributes:
        name: What users write in ``serve="…"``.
        version: The release, tag or commit whose source the rules were read from. Other releases may differ.
        rules: What it does not take.
        export: Format of `export_adapter` that it is exported to; ``None`` if it takes merged models only.
        not_known: What was not read, as short phrases.
    """

    name: str
    version: str
    rules: tuple[ServerRule, ...]
    export: str | None = None
    not_known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "version"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise TypeError(f"Server.{field} must be a non-empty string, not {value!r}")
        # A single rule is not a sequence of rules.
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, ServerRule) for rule in self.rules):
            raise TypeError(f"Server.rules must be a tuple of ServerRule, not {self.rules!r:.80}")

    def judge(self, traits: AdapterTraits) -> ServingVerdict:
        """Apply every rule to an adapter. A rule that raises leaves its question open."""
        reasons, not_known = [], list(self.not_known)
        for rule in self.rules:
            try:
                reason = rule.check(traits)
            except Exception as error:
                not_known.append(f"the rule {rule.name!r}, which raised {type(error).__name__}: {error}")
                continue
            if reason:
                reasons.append(f"{reason} [{rule.source}]")
        if traits.model_type is None:
            not_known.append("the type of the base")
        return ServingVerdict(self.name, self.version, tuple(reasons), tuple(not_known))
