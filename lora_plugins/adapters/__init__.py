"""From a base model to a PeftModel, and from there to files and back."""
