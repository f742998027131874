"""Facts of NVIDIA GPUs."""
