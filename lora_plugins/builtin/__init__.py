"""The plugins that lora-plugins ships. They use the public names only, as a third party would."""
