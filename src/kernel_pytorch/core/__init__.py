"""The nouns and protocols at the bottom, and the manager at the top; import the modules, not this package."""
