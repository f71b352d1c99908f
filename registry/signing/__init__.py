"""Sign releases and verify signatures offline, by key or certificate."""
