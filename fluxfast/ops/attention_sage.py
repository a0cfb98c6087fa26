"""SageAttention's kernels (package `sageattention`, arXiv 2410.02367), which have no backward.

Products of q and k run in int8, so that results are rounded more than those of other back ends.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

_PACKAGE = "sageattention"
# the package's function for each back end
FUNCTIONS = {
    "sageattention": "sageattn",
    "sageattention-int8-fp16-triton": "sageattn_qk_int8_pv_fp16_triton",
    "sageattention-int8-fp16-cuda": "sageattn_qk_int8_pv_fp16_cuda",
    "sageattention-int8-fp8-cuda": "sageattn_qk_int8_pv_fp8_cuda",
}


def missing(backend: str) -> str | None:
    """What of the package a back end lacks; None where it is all there."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"the package is not installed: pip install {_PACKAGE}"
    function = FUNCTIONS[backend]
    if not hasattr(importlib.import_module(_PACKAGE), function):
        return f"the package that is installed has no {function}: install a later version"
    return None


@torch.no_grad()
def forward(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v; q, k, v [B, S, heads, head_dim] to the same."""
    function = getattr(importlib.import_module(_PACKAGE), FUNCTIONS[backend])
    return function(q, k, v, tensor_layout="NHD", is_causal=False)
