"""What a run is trained from, recorded while it trains."""
