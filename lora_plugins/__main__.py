"""``python -m lora_plugins`` is the program ``lora-plugins``."""

from lora_plugins.commands.cli import main

if __name__ == "__main__":
    main()
