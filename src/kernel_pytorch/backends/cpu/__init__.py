"""How to run and time on a CPU."""
