"""The releases of a repository: index, state, aliases, withdrawals."""
