"""How to run and time on Intel GPUs; unverified: nobody has run the contract suite on one."""
