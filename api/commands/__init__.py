"""The commands of `emo`, one module each. `cli.py` puts them together."""
