"""Train by command line: arguments, data, run, results."""
