"""Built-in quantization backends."""
