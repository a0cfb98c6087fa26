"""Checks of this machine: the kernels run here beside their references, before a run relies on
them.

A `Scope` (`scope`) says in plain values what a run needs checked. `catalogue` makes the checks of
it, from `op_checks`, `linear_checks` and so on; `executor` runs them here or in processes of their
own (`worker`), each through `examine`; `store` keeps the outcomes. `startup` is what a run does
with all this before it begins: check what is unknown, and tell `ops.verdicts` what failed, so that
`auto` passes over it.
"""
