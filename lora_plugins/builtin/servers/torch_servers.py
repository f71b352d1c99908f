"""vLLM, SGLang, TGI and transformers' own server."""

from __future__ import annotations

from lora_plugins import AdapterTraits, Server, ServerRule
from lora_plugins.builtin.servers.traits import forbid, forbid_extras

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


VLLM = Server(
    "vllm",
    "0.33.0",
    (
        *forbid_extras(_PEFT_HELPER, "is refused", "dora", "lora-bias", "bias", "replication"),
        ServerRule("modules-to-save", _PEFT_HELPER, _check_vllm_saved),
        ServerRule("initialization", _PEFT_HELPER, _check_vllm_init),
        ServerRule("rank", "vllm/config/lora.py", _check_vllm_rank),
        forbid("variants", _PEFT_HELPER, "is refused or not read"),
        *forbid_extras("vllm/lora/utils.py", "is refused: its tensors have no LoRA name", "tokens", "whole-weights"),
    ),
    export="vllm",
    not_known=("which modules the served model's class takes (vllm/lora/lora_model.py asks it)",),
)

_SGLANG_WEIGHTS = "sglang/srt/lora/lora.py"

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
