"""The native module's GPU kernels: whether they can be called here, and on which queue they run."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops import dispatch


def obstacle() -> str | None:
    """Why the native module can't be called with tensors on a GPU; None where it can."""
    if not dispatch.HAS_NATIVE:
        return "the native module fluxfast._C was not built"
    backend, torchs = dispatch.native.gpu_backend(), "cuda" if torch.version.hip is None else "hip"
    if not backend:
        return (
            f"fluxfast._C was built without GPU kernels (FLUXFAST_{torchs.upper()}=ON at its "
            "build says what they need)"
        )
    if backend != torchs:
        return f"fluxfast._C was built for {backend}, and torch for {torchs}"
    error = dispatch.native.gpu_error()
    return None if error is None else f"{backend} says: {error}"


def queue(tensor: Tensor) -> tuple[int, int]:
    """A kernel's last arguments: the device of `tensor`, and the current stream there."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream
