"""Publish a trained adapter as a release."""
