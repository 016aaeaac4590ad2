"""Commands that let a person try a model."""
