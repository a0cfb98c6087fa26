"""`python -m fluxfast_bench.loops.starts.without_triton SCRIPT ARGS…`: as where there is no Triton.

It changes one thing: `import triton` fails, and packages that look for Triton don't find it. So it
is beside a torch that was built for CPUs. Where a torch for GPUs runs without one, Triton is there
and finds no driver, and a program that defines kernels when it is imported stops at that.
"""

from __future__ import annotations

import sys

from fluxfast_bench.loops.starts.script import run_script

if __name__ == "__main__":
    # Python takes it for a module that can't be imported, `find_spec` for one that isn't there
    sys.modules["triton"] = None  # type: ignore[assignment]
    run_script(sys.argv[1:])
