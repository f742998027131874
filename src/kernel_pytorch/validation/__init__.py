"""Proves that a candidate computes what the unmodified model computes; import the modules, not this package."""
