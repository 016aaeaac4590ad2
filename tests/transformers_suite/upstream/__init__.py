"""Transformers' own tests, importable as a package.

Its modules lie in two folders. The downloaded one holds what the source distribution ships. This one holds
stand-ins, under upstream's names, for the modules that those import and that the distribution leaves out.
"""

from transformers_suite.fetch import fetch_tests

__path__.append(str(fetch_tests()))
