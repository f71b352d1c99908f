"""Which releases a repository has: index, state, aliases, withdrawals."""
