"""What a process pays for its imports, before it has done anything: a part of `startup`.

It is processor time, which other programs disturb less than the clock, of a fresh process each
time: the least of several, with all sources compiled to bytecode as in any second run. torch and
diffusers stand beside ours, because most of the time is theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

# every module of a package; kernels are imported when an op first asks for one, so a run on a GPU
# has them all
ALL_OF = "for m in pkgutil.walk_packages({0}.__path__, '{0}.'): importlib.import_module(m.name)"
KERNELS = f"import fluxfast_kernels\n{ALL_OF.format('fluxfast_kernels')}"
IMPORTS = {
    "torch": "import torch",
    "diffusers' FluxTransformer2DModel": "from diffusers import FluxTransformer2DModel",
    "fluxfast.ops, kernels": f"import fluxfast.ops\n{ALL_OF.format('fluxfast.ops')}\n{KERNELS}",
    "FluxTransformer, kernels": f"from fluxfast import FluxTransformer\n{KERNELS}",
    "the trainer, kernels": f"from fluxfast.train.trainer import train\n{KERNELS}",
}
# the first one compiles to bytecode, and never is the least
RUNS = 4
PROCESS = """
import importlib, pkgutil, time
begun = time.process_time()
{}
print(time.process_time() - begun)
"""


def seconds_of(code: str, bytecode: str) -> float:
    """Processor seconds of imports in a fresh process, with a folder for compiled sources.

    Raises ValueError where they fail.
    """
    env = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    run = subprocess.run(
        [sys.executable, "-c", PROCESS.format(code)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    if run.returncode:
        raise ValueError(f"imports failed: {run.stderr.strip().splitlines()[-1]}")
    return float(run.stdout.split()[-1])


def measure() -> list[dict[str, Any]]:
    """A record for each of IMPORTS."""
    with tempfile.TemporaryDirectory() as bytecode:
        return [
            {
                "case": "imports",
                "contestant": name,
                "ours": "fluxfast" in code,
                "import_seconds": round(min(seconds_of(code, bytecode) for _ in range(RUNS)), 3),
            }
            for name, code in IMPORTS.items()
        ]
