"""y = x Wᵀ for a few vectors x, on the CPU: W is read once, in the format that it is stored in.

The native module never decodes W as a whole. It sums products in fp32 and applies scales to sums
over their groups, row by row, so the result does not depend on the number of threads, nor a
sample's on the others in its batch. A format that it has no code for is decoded by its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.tensors import dense_rows
from fluxfast.quant.format import Format
from fluxfast.quant.nf4 import absmax_code
from fluxfast.quant.rows import FLOAT_TYPES, read_args
from fluxfast.quant.weight import QuantWeight


def gemv_ref(x: Tensor, weight: Tensor | QuantWeight) -> Tensor:
    """y [B, N] in x's dtype, for x [B, K] in fp32 or wider and any weight [N, K]."""
    if isinstance(weight, QuantWeight):
        weight = weight.to(torch.float32, impl="ref")
    return torch.nn.functional.linear(x, weight.to(x.dtype))


def gemv(
    x: Tensor,
    weight: Tensor | QuantWeight,
    out: Tensor | None = None,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """y [B, N] of x [B, K] and weight [N, K], all on the CPU.

    x and y are fp32; the weight is fp32, bf16, fp16 or quantised. `out`: where to write y,
    contiguous. `threads`: how many compute (None: as many as PyTorch's). No gradients. Raises
    ValueError on an `impl` ("native" or "ref") that can't.
    """
    with torch.no_grad():
        backend = dispatch.resolve("gemv", impl, (x,), native_obstacle=_obstacle(weight))
        if out is None:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        assert out.shape == (x.shape[0], weight.shape[0]) and x.shape[1] == weight.shape[1]
        if backend == "ref":
            return out.copy_(gemv_ref(x, weight))
        # native code reads and writes by address
        assert out.is_cpu and out.is_contiguous() and out.dtype == torch.float32
        x = x.contiguous()
        vectors = (x.data_ptr(), out.data_ptr(), x.shape[0], *weight.shape)
        if isinstance(weight, QuantWeight):
            parts = [part.contiguous() for part in weight.parts.values()]
            if weight.format.name == "nf4":
                parts.append(absmax_code(x.device))
            run = getattr(dispatch.native, f"gemv_{weight.format.name}")
            run(*vectors, *(part.data_ptr() for part in parts), threads or torch.get_num_threads())
        else:
            weight = dense_rows(weight)
            address, dtype, _, _, stride = read_args(weight)
            dispatch.native.gemv_float(
                *vectors, address, dtype, stride, threads or torch.get_num_threads()
            )
        return out


def _obstacle(weight: Tensor | QuantWeight) -> str | None:
    if isinstance(weight, QuantWeight):
        read = has_native_gemv(weight.format)
        what = weight.format.name
    else:
        read, what = weight.dtype in FLOAT_TYPES, str(weight.dtype)
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}"
    return None if read else f"the native module doesn't read {what}"


def has_native_gemv(format: Format) -> bool:
    """Whether the native module, if there is one, reads weights in a format."""
    return not dispatch.HAS_NATIVE or hasattr(dispatch.native, f"gemv_{format.name}")
