"""Pools: the few experts that the tokens of a document share, in training and for a prompt."""
