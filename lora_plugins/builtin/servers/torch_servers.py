"""vLLM, SGLang, TGI and transformers' own server."""

from __future__ import annotations

from lora_plugins import AdapterTraits, Server, ServerRule
from lora_plugins.builtin.servers.traits import find_ends, forbid, forbid_extras
from lora_plugins.builtin.servers.vllm_types import ENDS, RENAMED, WITHOUT_ADAPTERS

__all__ = ["SGLANG", "TGI", "TRANSFORMERS", "VLLM"]

_PEFT_HELPER = "vllm/lora/peft_helper.py"
#: The largest value of ``--max-lora-rank``.
_VLLM_RANK = 512
#: Initializations that vLLM takes: they set the adapter's first values only.
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def _check_vllm_saved(traits: AdapterTraits) -> str | None:
    other = [name for name in traits.modules_to_save if name not in ("classifier", "score")]
    return f"modules_to_save={other} is refused; only classifier and score are taken" if other else None


def _check_vllm_rank(traits: AdapterTraits) -> str | None:
    return f"rank {traits.rank} is refused; the highest is {_VLLM_RANK}" if traits.rank > _VLLM_RANK else None


def _check_vllm_init(traits: AdapterTraits) -> str | None:
    init = traits.init
    if not isinstance(init, str) or init.lower() in _VLLM_INITS:
        return None
    return f"init_lora_weights={init!r} is refused"


def _check_vllm_type(traits: AdapterTraits) -> str | None:
    kind = traits.model_type
    return f"its class for a {kind!r} takes no adapter" if kind in WITHOUT_ADAPTERS else None


def _check_vllm_ends(traits: AdapterTraits) -> str | None:
    kind = traits.model_type or ""
    taken, renamed = ENDS.get(kind), RENAMED.get(kind, {})
    refused = [name for name in find_ends(traits) if taken is not None and renamed.get(name, name) not in taken]
    return f"an adapter on {', '.join(refused)} of a {kind!r} is refused" if refused else None


VLLM = Server(
    "vllm",
    "0.33.0",
    (
        *forbid_extras(_PEFT_HELPER, "is refused", "dora", "lora-bias", "bias", "replication"),
        ServerRule("modules-to-save", _PEFT_HELPER, _check_vllm_saved),
        ServerRule("initialization", _PEFT_HELPER, _check_vllm_init),
        ServerRule("rank", "vllm/config/lora.py", _check_vllm_rank),
        ServerRule("type", "vllm/v1/worker/lora_model_runner_mixin.py", _check_vllm_type),
        ServerRule("ends", "vllm/lora/lora_model.py", _check_vllm_ends),
        forbid("variants", _PEFT_HELPER, "is refused or not read"),
        *forbid_extras("vllm/lora/utils.py", "is refused: its tensors have no LoRA name", "tokens", "whole-weights"),
    ),
    export="vllm",
    not_known=("layers of the served model's class that are not linear (vllm/lora/lora_model.py asks it)",),
)

_SGLANG_WEIGHTS = "sglang/srt/lora/lora.py"
#: Modules whose sizes SGLang knows for every type, and the stacks of experts, which it names otherwise.
_SGLANG_MODULES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj", "experts"),
    *("embed_tokens", "vocab_emb", "embeddings", "word_embeddings", "lm_head", "output", "unembed_tokens"),
)
#: Types whose class has a ``get_hidden_dim`` of its own, which knows further modules.
_SGLANG_OWN_SIZES = (
    *("gemma3n_text", "gemma4_text", "inkling_model", "inkling_text", "interns2_mobius_text", "laguna", "llama4_text"),
    *("nemotron_h", "nemotron_h_puzzle", "qwen3_5_text", "qwen3_5_moe_text"),
)


def _check_sglang_modules(traits: AdapterTraits) -> str | None:
    other = [name for name in traits.modules if name not in _SGLANG_MODULES]
    if not other or traits.model_type in _SGLANG_OWN_SIZES:
        return None
    return f"an adapter on {', '.join(other)} is refused: it knows no size of these"


SGLANG = Server(
    "sglang",
    "0.5.23",
    (
        forbid("dora", "sglang/srt/lora/lora_manager.py", "is refused"),
        forbid("rslora", _SGLANG_WEIGHTS, "is ignored without an error: alpha / r is taken"),
        forbid("patterns", _SGLANG_WEIGHTS, "is ignored without an error: one alpha / r is taken for all"),
        *forbid_extras(
            *(_SGLANG_WEIGHTS, "is left out without an error"),
            *("modules-to-save", "tokens", "bias", "lora-bias", "whole-weights"),
        ),
        *forbid_extras("sglang/srt/lora/lora_config.py", "is not read", "initialization", "replication", "variants"),
        ServerRule("modules", "sglang/srt/lora/utils.py", _check_sglang_modules),
        forbid("expression", "sglang/srt/lora/utils.py", "is refused unless --lora-target-modules names them"),
    ),
    export="sglang",
    not_known=("which modules the served model's class takes", "stacked experts in PEFT's file"),
)

_TGI_LORA = "server/text_generation_server/adapters/lora.py"

TGI = Server(
    "tgi",
    "45d95bdccc9d",
    (
        *forbid_extras(
            _TGI_LORA, "is not read, and the answers are wrong", "dora", "patterns", "initialization", "variants"
        ),
        *forbid_extras(
            *(_TGI_LORA, "is left out", "modules-to-save", "tokens", "bias", "lora-bias", "embeddings", "experts"),
            "whole-weights",
        ),
        forbid("some-layers", _TGI_LORA, "is left out: a kind of module is taken in all layers or in none"),
        forbid("replication", _TGI_LORA, "is not read"),
    ),
    export="peft",
    not_known=("which modules the served model's class takes", "the highest rank"),
)

TRANSFORMERS = Server(
    "transformers",
    "5.23.0",
    (
        ServerRule(
            "adapter",
            "transformers/cli/serving/model_manager.py",
            lambda traits: "it reads a config.json, which an adapter has not: serve the merged model",
        ),
    ),
)
