"""Files and locks on a local disk."""
