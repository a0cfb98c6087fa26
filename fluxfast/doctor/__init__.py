"""The product checks itself on the machine that it runs on: nobody else has run its kernels there.

`scope` says what is to be checked, `op_checks` and its kin make the checks of it, `executor` runs
them here or in processes of their own, `store` keeps what was found, and `startup` is what a run
does with that before it begins.
"""
