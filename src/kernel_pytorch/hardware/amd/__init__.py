"""Facts of AMD GPUs under ROCm; unverified: nobody has run the contract suite on one."""
