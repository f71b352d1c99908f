"""The registry's pages, served or exported, and the page of a comparison."""
