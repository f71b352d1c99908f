"""Refuse Trainer settings under which a run would fail or learn nothing."""

from __future__ import annotations

from transformers import Trainer

from lora_plugins.errors import UnsupportedTraining

__all__ = ["check_supported"]


#: Optimizers that update weights inside the backward pass or keep one optimizer per layer: they have no
#: parameter groups that could be checked against the adapters.
_UNCHECKABLE_OPTIMIZERS = ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")


def check_supported(trainer: Trainer, adapter_name: str) -> None:
    """Refuse settings that cannot work with adapters, before anything is changed.

    Args:
        trainer: The Trainer as its user configured it.
        adapter_name: Name that the adapter will have.

    Raises:
        UnsupportedTraining: Names the option and the way out.
    """
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(optimizer == name for name in _UNCHECKABLE_OPTIMIZERS):
        raise UnsupportedTraining(
            f"optim={optimizer!r} updates weights outside its parameter groups, so it cannot be checked whether it "
            "holds the adapters. Use adamw_torch, adafactor, or a bitsandbytes optimizer."
        )
    if getattr(args, "fp16_full_eval", False) or getattr(args, "bf16_full_eval", False):
        name = "fp16_full_eval" if getattr(args, "fp16_full_eval", False) else "bf16_full_eval"
        raise UnsupportedTraining(
            f"{name}=True casts the whole model for an evaluation outside training, adapters included, and they "
            "would stay in 16 bits. Use bf16=True or fp16=True."
        )
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and strategy != "end" and adapter_name != "default":
        raise UnsupportedTraining(
            f"hub_strategy={strategy!r} pushes only an adapter called 'default' and this one is called "
            f"{adapter_name!r}: the repository would stay without it. "
            "Use hub_strategy='end', or leave adapter_name out."
        )
    if getattr(args, "n_gpu", 1) > 1 and not trainer.is_model_parallel:
        raise UnsupportedTraining(
            f"This process sees {args.n_gpu} GPUs and the Trainer would use torch.nn.DataParallel, where LoRA layers "
            "do not work. Start with `torchrun --nproc_per_node` or set CUDA_VISIBLE_DEVICES to one GPU."
        )
