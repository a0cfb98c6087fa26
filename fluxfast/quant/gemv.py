"""y = x Wᵀ for a few vectors x, on the CPU: W, in whatever format it is stored, is read once and
never decoded as a whole.

Products are summed in fp32, scales are applied to sums over their groups, row by row: the result
does not depend on the number of threads, nor a sample's on the others in its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.tensors import dense_rows
from fluxfast.quant.nf4 import absmax_code
from fluxfast.quant.rows import FLOAT_TYPES, read_args
from fluxfast.quant.weight import QuantWeight


def gemv_ref(x: Tensor, weight: Tensor | QuantWeight) -> Tensor:
    """y [B, N] of x [B, K], fp32 or wider, and weight [N, K] of any floating dtype or format, in
    x's dtype.
    """
    decoded = (
        weight.dequantize(torch.float32, impl="ref") if isinstance(weight, QuantWeight) else weight
    )
    return torch.nn.functional.linear(x, decoded.to(x.dtype))


def gemv(
    x: Tensor,
    weight: Tensor | QuantWeight,
    out: Tensor | None = None,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """y [B, N] of x [B, K] and weight [N, K]: x and y fp32; the weight fp32, bf16, fp16 or
    quantised; all on the CPU.

    `out`: where to write y, contiguous. `threads`: how many compute (None: as many as PyTorch's).
    No gradients. Raises ValueError on an `impl` ("native" or "ref") that can't.
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
        device = weight.parts["packed"].device
        known = not dispatch.HAS_NATIVE or hasattr(dispatch.native, f"gemv_{weight.format.name}")
        reason = None if known else f"the native module has none for {weight.format.name}"
    else:
        device = weight.device
        reason = (
            None
            if weight.dtype in FLOAT_TYPES
            else f"the native module doesn't read {weight.dtype}"
        )
    return reason if device.type == "cpu" else f"the weight is on {device}"
