"""Identify an adapter's base model and check that the two fit."""
