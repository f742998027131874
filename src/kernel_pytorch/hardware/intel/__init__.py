"""Facts of Intel GPUs; unverified: nobody has run the contract suite on one."""
