"""Fails while it is imported."""

raise RuntimeError("no licence found\n  in the usual place")
