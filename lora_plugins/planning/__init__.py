"""Plan a run's trainable parameters and memory without loading weights."""
