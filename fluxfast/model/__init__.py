"""The FLUX.1 transformer on fluxfast's ops.

`transformer` is the model, `double_block` and `single_block` its two kinds of block, each as maths
and as one autograd node; `tape` is what a block's forward leaves for its backward. `modulation`
computes shifts, scales and gates ahead, `routing` leaves tokens out (TREAD), `graphs` replays
steps, and `linear` reads the modules that blocks hold. `apply` sets on blocks what was chosen.
"""
