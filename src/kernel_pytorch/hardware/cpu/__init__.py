"""Facts of a CPU."""
