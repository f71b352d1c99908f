"""Another default for GPT-2, and a quantization backend."""
