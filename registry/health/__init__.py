"""What is wrong with an adapter, and a cured copy of it."""
