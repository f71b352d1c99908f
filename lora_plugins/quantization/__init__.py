"""How the frozen base model is stored: quantized layers, dtypes, sizes."""
