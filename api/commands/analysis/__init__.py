"""The commands that measure a model."""
