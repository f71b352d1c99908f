"""Routed experts: our experts function, and the adapters on experts."""
