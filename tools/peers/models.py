"""Make small random models under the ids that peers' tests load from the Hub.

Sizes follow the models of the same names where a test depends on them (layers, heads, a tied head); vocabularies are
cut down, and every model gets the same tokenizer.
"""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from registry.testing import LoopbackHub

__all__ = ["MODELS", "Model", "fill_hub"]

VOCABULARY = 1024
TEXT = [
    "The quick brown fox jumps over the lazy dog, and a model with few weights reads it many times.",
    "Be yourself; everyone else is already taken. So many books, so little time.",
]


@dataclass(frozen=True)
class Model:
    """A model to make: the class that loads it, its type, and fields of its configuration."""

    loader: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> transformers.PreTrainedModel:
        """Return the model with random weights, the same ones in every call."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.config)
        made: transformers.PreTrainedModel = getattr(transformers, self.loader).from_config(config)
        return made


def _describe_decoder(
    hidden: int = 16, layers: int = 2, heads: int = 4, kv_heads: int = 4, **more: Any
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return {**fields, **more}


def _describe_opt(hidden: int = 16, layers: int = 5, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "num_attention_heads": 4}
    return {**sizes, **tokens, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **more}


def _describe_encoder(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
    return {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 2, **more}


def _describe_gpt2(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, **more}


def _describe_t5() -> dict[str, Any]:
    sizes = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4}
    return {**sizes, "vocab_size": VOCABULARY, "decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1}


def _describe_bart() -> dict[str, Any]:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 16, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 1}
    return {**layers, **sizes, **tokens, "vocab_size": VOCABULARY, "forced_eos_token_id": 1}


_LM = "AutoModelForCausalLM"
_OPT = Model(_LM, "opt", _describe_opt())
_LLAMA = Model(_LM, "llama", _describe_decoder())
_GPT2 = Model(_LM, "gpt2", _describe_gpt2(bos_token_id=0, eos_token_id=1))
_BERT = Model("AutoModel", "bert", _describe_encoder())
_BERT_CLASSIFIER = Model("AutoModelForSequenceClassification", "bert", _describe_encoder())
_T5 = Model("AutoModelForSeq2SeqLM", "t5", _describe_t5())
# A chat template in the form that most decoders use.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "head_dim": 8}

MODELS: dict[str, Model] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Model(
        _LM, "gemma3_text", _describe_decoder(head_dim=8, kv_heads=2, tie_word_embeddings=True)
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-MistralForCausalLM": Model(
        _LM, "mistral", _describe_decoder(hidden=32, kv_heads=2)
    ),
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    # Its hidden size stands in the tests, which also want non-zero rows for all low token ids.
    "peft-internal-testing/opt-125m": Model(
        _LM, "opt", _describe_opt(hidden=768, layers=2, ffn_dim=64, pad_token_id=VOCABULARY - 1)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": Model(_LM, "qwen2", _describe_decoder(hidden=8, kv_heads=2)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": Model(
        "AutoModelForSeq2SeqLM", "bart", _describe_bart()
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _BERT_CLASSIFIER,
    "peft-internal-testing/tiny-random-BertModel": _BERT,
    "peft-internal-testing/tiny-random-DebertaModel": Model("AutoModel", "deberta", _describe_encoder()),
    "peft-internal-testing/tiny-random-DebertaV2Model": Model("AutoModel", "deberta-v2", _describe_encoder()),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Model(
        _LM, "gptj", _describe_gpt2(rotary_dim=4, bos_token_id=0, eos_token_id=1)
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": Model(
        "AutoModelForSequenceClassification", "roberta", _describe_encoder()
    ),
    "peft-internal-testing/tiny-random-RobertaModel": Model("AutoModel", "roberta", _describe_encoder()),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-t5": _T5,
    "tiiuae/falcon-mamba-tiny-dev": Model(
        _LM, "falcon_mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": Model(_LM, "gpt_oss", _describe_decoder(kv_heads=2, **_EXPERTS)),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Model(
        _LM, "llama4_text", _describe_decoder(kv_heads=2, intermediate_size_mlp=64, **_EXPERTS)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Model(
        "AutoModelForSequenceClassification", "llama", _describe_decoder()
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": Model(
        _LM, "nemotron_h", _describe_decoder(kv_heads=2, layers_block_type=["mamba", "attention"], **_MAMBA)
    ),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": Model(_LM, "qwen2", _describe_decoder(kv_heads=2)),
    "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5": Model(
        "AutoModelForSequenceClassification", "qwen2", _describe_decoder(kv_heads=2, num_labels=1)
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": Model(
        _LM, "qwen3_moe", _describe_decoder(kv_heads=2, moe_intermediate_size=16, num_experts=4, **_EXPERTS)
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Model(_LM, "qwen3", _describe_decoder(hidden=8, kv_heads=2)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
}

#: Adapters: id -> the model it is made on.
ADAPTERS = {"peft-internal-testing/tiny-OPTForCausalLM-lora": "peft-internal-testing/tiny-random-OPTForCausalLM"}


def _make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    made.chat_template = CHAT
    return made


def _commit_folder(hub: LoopbackHub, name: str, folder: str) -> None:
    hub.create_repo(name)
    hub.commit(name, {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})


def fill_hub(hub: LoopbackHub) -> None:
    """Put every model and adapter into the hub."""
    tokenizer = _make_tokenizer()
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model.make().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _commit_folder(hub, name, folder)
    for name, base in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=base)
        with tempfile.TemporaryDirectory() as folder:
            peft.get_peft_model(MODELS[base].make(), config).save_pretrained(folder)
            _commit_folder(hub, name, folder)
