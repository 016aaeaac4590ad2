"""What `emo run` chooses for every model that a program loads."""
