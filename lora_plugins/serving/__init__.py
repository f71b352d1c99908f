"""From an adapter to a server: exports and launch lines."""
