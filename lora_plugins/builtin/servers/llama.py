"""llama.cpp and Ollama."""

from __future__ import annotations

from lora_plugins import AdapterTraits, Server, ServerRule
from lora_plugins.builtin.servers.traits import find_ends, forbid_extras

__all__ = ["LLAMA_CPP", "OLLAMA"]

_ADAPTER = "src/llama-adapter.cpp"
_GRAPH = "src/llama-graph.cpp"

#: The types whose order of rows `export_adapter` knows and that were run in llama.cpp.
_TYPES = (
    *("bloom", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2"),
    *("olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)

#: The ones among them that Ollama runs in its own engine, which loads no adapter.
_OWN_ENGINE = ("gemma3_text", "qwen3", "qwen3_moe")


def _check_type(traits: AdapterTraits) -> str | None:
    if traits.model_type is None or traits.model_type in _TYPES:
        return None
    return f"how it orders the rows of a {traits.model_type!r} is not known here"


def _check_shared(traits: AdapterTraits) -> str | None:
    ends = find_ends(traits)
    if not ends or not traits.shared_head:
        return None
    return f"an adapter on {', '.join(ends)}, whose weight head and embedding share, has no place of its own"


def _check_engine(traits: AdapterTraits) -> str | None:
    if traits.model_type not in _OWN_ENGINE:
        return None
    return f"a {traits.model_type!r} runs in its own engine, which answers 'loras are not yet implemented'"


_RULES = (
    *forbid_extras(
        _ADAPTER,
        "has no place in a LoRA file",
        *("dora", "lora-bias", "bias", "modules-to-save", "tokens", "variants", "replication", "initialization"),
        "whole-weights",
    ),
    ServerRule("type", "conversion/", _check_type),
    ServerRule("shared-head", _GRAPH, _check_shared),
)

LLAMA_CPP = Server("llama.cpp", "b11549", _RULES, export="gguf")

OLLAMA = Server(
    "ollama",
    "008a6caeac6c",
    (*_RULES, ServerRule("engine", "fs/ggml/ggml.go and runner/ollamarunner/runner.go", _check_engine)),
    export="ollama",
    not_known=("which release of llama.cpp it holds",),
)
