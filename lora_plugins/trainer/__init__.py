"""Everything that touches a Trainer."""
