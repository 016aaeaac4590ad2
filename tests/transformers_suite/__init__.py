"""Transformers' own tests of a model, run on EMO.

`fetch.py` gets them, `upstream/` makes them importable, `suite.py` puts them together, and `baseline.py`
compares EMO with OLMoE, a relative that is part of Transformers.
"""
