"""Private launch helpers for Triton kernels: no mathematics. Importing this package does not import triton."""
