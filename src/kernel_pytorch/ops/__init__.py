"""Fused operations: one package each, with its definition, its kernels and their shapes."""
