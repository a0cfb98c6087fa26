"""`python -m fluxfast_bench.loops.starts.unpinned SCRIPT ARGS…`: without pinned memory.

SimpleTuner pins what it reads from its caches, so that a GPU can fetch it while it computes. Where
there is no GPU, torch's `Tensor.pin_memory` raises an error. This makes it return the tensor as it
is, and changes nothing else; then the script runs as Python would run it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fluxfast_bench.loops.starts.script import run_script


def _as_it_is(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


if __name__ == "__main__":
    tensors: Any = torch.Tensor
    tensors.pin_memory = _as_it_is
    run_script(sys.argv[1:])
