"""Keeps what is fast fast: compares revisions, environments and plans, remembers every run, and says what changed."""
