"""The registry's pages: served on this machine, exported as files, and the page of a comparison."""
