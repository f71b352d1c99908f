"""The registry's commands of ``lora-plugins``. Each module loads what is heavy only when a command runs."""
