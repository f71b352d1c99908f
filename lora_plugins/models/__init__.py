"""Read a live model: its structure, its wrappers, how it is sharded."""
