"""HTTP as the registry speaks it: deadlines, limits, redirects and secrets."""
