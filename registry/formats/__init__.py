"""Parse and write all file formats, without a hub or torch."""
