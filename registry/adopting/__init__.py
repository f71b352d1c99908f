"""Publish adapters that others have saved: repositories, folders, caches."""
