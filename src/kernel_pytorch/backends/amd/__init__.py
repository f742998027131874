"""How to run and time on AMD GPUs under ROCm; unverified: nobody has run the contract suite on one."""
