"""Models in 8 and 4 bits: how they are asked for, and how they stand on disk."""
