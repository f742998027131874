"""Tests of the TPU runtimes; `make test-tpu` builds their environments and runs them."""
