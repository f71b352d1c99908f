"""The commands of ``lora-plugins``, one module each."""
