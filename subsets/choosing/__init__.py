"""Choosing the experts of a domain from text."""
