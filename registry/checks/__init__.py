"""The checks of adapters: records that push, pull, load and doctor share."""
