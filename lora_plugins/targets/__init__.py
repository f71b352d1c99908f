"""Which modules of a model get adapters."""
