"""The order of the five steps."""
