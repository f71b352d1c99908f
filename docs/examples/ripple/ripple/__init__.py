"""A small language model that transformers does not know; importing this registers it there."""

from transformers import AutoConfig, AutoModelForCausalLM

from ripple.model import RippleConfig, RippleForCausalLM

AutoConfig.register("ripple", RippleConfig, exist_ok=True)
AutoModelForCausalLM.register(RippleConfig, RippleForCausalLM, exist_ok=True)

__all__ = ["RippleConfig", "RippleForCausalLM"]
