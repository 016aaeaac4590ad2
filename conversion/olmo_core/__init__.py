"""The training checkpoint's own format, read and written."""
