"""The parts of `corpus.py`: where the text comes from, how it is cleaned, split and written."""
