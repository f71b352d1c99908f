"""Versioned, verified LoRA adapters on the Hugging Face Hub or in a plain folder."""
