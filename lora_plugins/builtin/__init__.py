"""Built-in plugins. They use the public names of `lora_plugins` only."""
