"""Training EMO: what `Trainer` needs beside the model."""

from .collator import DocumentCollator

__all__ = ["DocumentCollator"]
