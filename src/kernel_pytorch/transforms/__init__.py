"""The optimisations: one file each, named in `kernel_pytorch.catalog`."""
