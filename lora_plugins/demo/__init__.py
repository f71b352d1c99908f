"""The parts of ``lora-plugins demo``: a small model, real text, a run, and the proof that the adapter reloads."""
