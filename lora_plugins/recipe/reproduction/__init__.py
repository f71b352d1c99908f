"""Record a run of ``lora-plugins train``, and run it again."""
