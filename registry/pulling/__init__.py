"""Resolve a reference to a verified adapter on disk."""
