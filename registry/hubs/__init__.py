"""The places that keep adapters."""
