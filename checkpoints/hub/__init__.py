"""A repository of the Hub as a source of bytes."""
