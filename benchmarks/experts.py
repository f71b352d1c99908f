"""CPU time and memory of a step with adapters on routed experts: PEFT's own way, and ours on three kinds of base.

A random Qwen3-MoE of 162 million weights (64 experts, 8 used) takes steps of 512 tokens, in bfloat16 where the CPU
multiplies it natively, else in float32. All contenders
live in one process and take turns, so that a busy machine slows them all down alike. Peaks are counted from live tensor
storages above the model and its adapters: activations, temporaries and gradients, without the optimizer's state.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from lora_plugins import prepare_model

#: About 162 million weights, 93 % of them in experts.
SIZES = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}
REST = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
STACKS = ("experts.gate_up_proj", "experts.down_proj")


#: Dtype of the base, by name; `main` sets it.
DTYPE = {"name": "float32"}


def make_base() -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **REST, head_dim=64, tie_word_embeddings=True, use_cache=False)
    return Qwen3MoeForCausalLM(config).to(getattr(torch, DTYPE["name"]))


def attention_only() -> Any:
    return prepare_model(make_base(), **LORA, lora_dropout=0.0, experts="none", compute_dtype=DTYPE["name"])


def peft_routed() -> Any:
    """PEFT as it is, with the ranks that ours have."""
    from peft import LoraConfig, get_peft_model

    pattern = {r".*\.experts\.gate_up_proj": 16}
    alphas = dict.fromkeys(pattern, 64)
    config = LoraConfig(**LORA, target_parameters=list(STACKS), rank_pattern=pattern, alpha_pattern=alphas)
    return get_peft_model(make_base(), config)


def ours(quantization: str | None = None, dropout: float = 0.0) -> Callable[[], Any]:
    def make() -> Any:
        wanted = {**LORA, "lora_dropout": dropout, "experts": "routed", "compute_dtype": DTYPE["name"]}
        return prepare_model(make_base(), quantization=quantization, **wanted)

    return make


CONTENDERS: dict[str, Callable[[], Any]] = {
    "adapters on attention alone": attention_only,
    "PEFT, experts too": peft_routed,
    "ours, float": ours(),
    "ours, float, dropout 0.05": ours(dropout=0.05),
    "ours, int8": ours("int8"),
    "ours, nf4": ours("nf4"),
}


def take_step(model: Any, ids: Any) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def measure_peak(model: Any, ids: Any) -> int:
    from lora_plugins.planning.step import LiveBytes

    gc.collect()
    with LiveBytes() as live:
        take_step(model, ids)
    return live.peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    ids = torch.randint(0, REST["vocab_size"], (1, options.length), generator=torch.Generator().manual_seed(0))
    models = {name: make().train() for name, make in CONTENDERS.items()}
    peaks = {name: measure_peak(model, ids) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            start = time.process_time()
            take_step(model, ids)
            times[name].append(time.process_time() - start)
    base = next(iter(models))
    return {
        name: {
            "cpu_s": median(times[name]),
            "times": median(now / alone for now, alone in zip(times[name], times[base], strict=True)),
            "peak": peaks[name],
            "peaks": peaks[name] / peaks[base],
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for name, model in models.items()
    }


def make_table(found: dict[str, Any]) -> str:
    lines = [
        "| contender | CPU s a step | × attention alone | MB above the model | × attention alone |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one['cpu_s']:.2f} | {one['times']:.2f} | {one['peak'] / 1e6:.0f} | {one['peaks']:.2f} |"
        )
    return "\n".join(lines)


def choose_dtype() -> str:
    from lora_plugins.quantization.precision import loading_dtype

    return str(loading_dtype()).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contender")
    parser.add_argument("--length", type=int, default=512, help="tokens a step")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the base; default: what this CPU is fast in"
    )
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    DTYPE["name"] = options.dtype or choose_dtype()
    table = make_table(measure(options))
    print(f"Base in {DTYPE['name']}, {options.length} tokens, {options.rounds} rounds, one thread\n\n{table}")
    if options.write is not None:
        options.write.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
