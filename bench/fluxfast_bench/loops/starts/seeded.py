"""`python -m fluxfast_bench.loops.starts.seeded SCRIPT ARGS…`: with a seed.

Before the script it seeds Python's, NumPy's and torch's generators, once, and changes nothing else.
That is for scripts that initialise what they train without a seed of their own.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from fluxfast_bench.loops.starts.script import run_script

SEED = 1

if __name__ == "__main__":
    random.seed(SEED)
    # libraries of a trainer's draw from NumPy's one generator
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    run_script(sys.argv[1:])
