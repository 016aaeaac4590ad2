"""Compiled code for the network, and what calls it."""
