"""How this process's threads wait for one another on the CPU.

PyTorch computes in OpenMP's threads, and so does our native module. They meet at the end of each
operation, and GNU's OpenMP lets a thread that is early look for the others 300,000 times, which is
several milliseconds, before it sleeps. Beside a busy program such a thread keeps the very core for
which the last one waits, at every operation: a step takes ten times as long and more.
"""

import os

# about 0.1 ms of looking, which bridges most of the gaps between two operations
# (bench/LOG.md, 2026-11-28, has what other numbers cost on a quiet and on a busy machine)
SPINS = 3000


def share_cores() -> None:
    """Have waiting threads sleep soon, so that other programs can use the cores.

    OpenMP reads the environment when PyTorch is imported, so a command calls this before. What the
    user says there (OMP_WAIT_POLICY, GOMP_SPINCOUNT) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
