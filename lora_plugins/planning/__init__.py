"""What a run would take, before anything is spent: `plan` and what it is made of."""
