"""The commands about a run that has ended: ``report`` and ``reproduce``."""
