"""Commands that say what a model takes, before anything is downloaded or run."""
