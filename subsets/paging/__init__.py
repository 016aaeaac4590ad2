"""Experts that are read when a token takes them, into a memory of a budget."""
