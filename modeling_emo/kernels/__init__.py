"""Compiled code for the network, and the functions that call it."""
