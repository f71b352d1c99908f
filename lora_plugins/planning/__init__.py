"""What a run would train, weigh and need, without loading weights."""
