"""The `demo` command: the whole product on one machine, offline."""
