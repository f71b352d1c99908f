"""What `lora-plugins train` does."""
