"""A repository of the Hub as a source of bytes, and the place to upload to."""
