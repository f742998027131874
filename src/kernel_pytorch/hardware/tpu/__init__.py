"""Facts of Google's TPUs; unverified: nobody has run the contract suite on one."""
