"""The registry's HTTP: deadlines, limits, redirects and secrets."""
