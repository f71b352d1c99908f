"""The plugin contract and its host. Loads no torch."""
