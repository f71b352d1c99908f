"""Signatures of releases: made and verified offline, with keys or certificates."""
