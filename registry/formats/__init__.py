"""Parse and write every file format, without a hub and without torch."""
