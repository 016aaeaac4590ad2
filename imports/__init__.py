"""How modules are imported: names only when asked for, and packages that may be missing."""
