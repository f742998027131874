"""What builds the environments: pins, the plugin by hash, stubs of the CUDA libraries."""
