"""Mirror, compare, verify and clean up what is there."""
