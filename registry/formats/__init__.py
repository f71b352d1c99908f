"""Parsers and writers of every file format. They open no hub and load no torch."""
