"""Holds something that is no plugin."""

NAME = "fake"
