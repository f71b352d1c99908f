"""Which base model an adapter belongs to, and whether the two fit."""
