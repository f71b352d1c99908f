"""What other tools call our arguments, for messages about unknown names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_plugins.text import find_near

__all__ = ["ELSEWHERE", "suggest_arguments"]

#: Names in TRL, Axolotl, LLaMA-Factory, Unsloth and bitsandbytes, with our argument and, where it is fixed, its value.
ELSEWHERE: Mapping[str, tuple[str, str | None]] = {
    "rank": ("r", None),
    "lora_r": ("r", None),
    "lora_rank": ("r", None),
    "lora_target": ("target_modules", None),
    "lora_target_linear": ("target_modules", "all-linear"),
    "additional_target": ("modules_to_save", None),
    "load_in_8bit": ("quantization", "int8"),
    "load_in_4bit": ("quantization", "nf4"),
    "quantization_bit": ("quantization", None),
    "bits": ("quantization", None),
    "quant": ("quantization", None),
    "bnb_4bit_quant_type": ("quantization", None),
    "upcast_layernorm": ("upcast", "norms"),
}

#: What other tools put before the names of `peft.LoraConfig`.
_PREFIXES = ("lora_", "peft_")


def suggest_arguments(
    name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6
) -> list[tuple[str, str | None]]:
    """Return arguments that an unknown name may stand for, best first, each with the value that says the same.

    Args:
        name: What was written.
        known: The arguments there are.
        most: Number of arguments at most.
        cutoff: Similarity that a name must have where no other tool calls an argument so, 0 to 1.
    """
    known = list(known)
    if name in ELSEWHERE and ELSEWHERE[name][0] in known:
        return [ELSEWHERE[name]]
    for prefix in _PREFIXES:
        if name.removeprefix(prefix) in known:
            return [(name.removeprefix(prefix), None)]
    return [(near, None) for near in find_near(name, known, most=most, cutoff=cutoff)]
