"""Mirror, compare, verify and clean up releases."""
