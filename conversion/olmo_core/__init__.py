"""The format of OLMo-core's training checkpoints: reading it without unpickling, and writing it."""
