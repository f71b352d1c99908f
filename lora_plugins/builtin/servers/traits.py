"""Rules that several servers share, by what they do with an adapter."""

from __future__ import annotations

from collections.abc import Callable

from lora_plugins import AdapterTraits, ServerRule

__all__ = ["find_ends", "forbid", "forbid_extras"]

#: From traits to the words for something an adapter has; ``None`` if it has it not.
Trait = Callable[[AdapterTraits], str | None]


def _find_bias(traits: AdapterTraits) -> str | None:
    return f"bias={traits.bias!r}" if traits.bias != "none" else None


def _find_saved(traits: AdapterTraits) -> str | None:
    return f"modules_to_save={list(traits.modules_to_save)}" if traits.modules_to_save else None


def _find_init(traits: AdapterTraits) -> str | None:
    return f"init_lora_weights={traits.init!r}, which changed the base," if traits.changes_base else None


def _find_whole(traits: AdapterTraits) -> str | None:
    return f"the whole {', '.join(traits.whole_weights)} in its file" if traits.whole_weights else None


def _find_embeddings(traits: AdapterTraits) -> str | None:
    return f"an adapter on {', '.join(traits.embeddings)}" if traits.embeddings else None


#: By the name of the rule.
_TRAITS: dict[str, Trait] = {
    "bias": _find_bias,
    "dora": lambda traits: "DoRA" if traits.use_dora else None,
    "embeddings": _find_embeddings,
    "experts": lambda traits: "an adapter on stacked experts" if traits.experts else None,
    "expression": lambda traits: None if traits.listed else "target_modules as a regular expression",
    "initialization": _find_init,
    "lora-bias": lambda traits: "lora_bias" if traits.lora_bias else None,
    "modules-to-save": _find_saved,
    "patterns": lambda traits: "a rank or scale by pattern" if traits.patterns else None,
    "replication": lambda traits: "layer_replication" if traits.replicated else None,
    "rslora": lambda traits: "rsLoRA's scale" if traits.use_rslora else None,
    "some-layers": lambda traits: "an adapter on some of the layers" if traits.some_layers else None,
    "tokens": lambda traits: "trainable_token_indices" if traits.trained_tokens else None,
    "variants": lambda traits: " and ".join(traits.variants) or None,
    "whole-weights": _find_whole,
}


def find_ends(traits: AdapterTraits) -> list[str]:
    """Return the names of the input embedding and the output head that have an adapter."""
    return [*traits.embeddings, *(name for name in traits.modules if name in ("lm_head", "embed_out"))]


def forbid(name: str, source: str, does: str) -> ServerRule:
    """Return the rule for one trait.

    Args:
        name: Its name above.
        source: File of the server.
        does: What the server does with it, as the rest of the sentence that begins with the trait.
    """
    find = _TRAITS[name]

    def check(traits: AdapterTraits) -> str | None:
        found = find(traits)
        return f"{found} {does}" if found else None

    return ServerRule(name, source, check)


def forbid_extras(source: str, does: str, *names: str) -> tuple[ServerRule, ...]:
    """Return the rules for several traits that a server treats alike."""
    return tuple(forbid(name, source, does) for name in names)
