"""Pack whole examples into rows, and keep them apart in the model."""
