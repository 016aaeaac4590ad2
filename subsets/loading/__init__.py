"""A subset of experts into a network: loading, swapping and masking."""
