"""How to run and time on NVIDIA GPUs."""
