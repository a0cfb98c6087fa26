"""y = x Wᵀ for a few vectors x, on the CPU: W is read once, in the format that it is stored in.

The native module never decodes W as a whole. It sums products in fp32 and applies scales to sums
over their groups, row by row, so the result does not depend on the number of threads, nor a
sample's on the others in its batch. A format that it has no code for is decoded by its reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

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
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    gemv_each(x, [weight], [out], impl=impl, threads=threads)
    return out


def gemv_each(
    x: Tensor,
    weights: Sequence[Tensor | QuantWeight],
    outs: Sequence[Tensor],
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> None:
    """The `gemv` of x with each weight, written to `outs`; as `gemv` in everything else.

    Native products are one call, which does not wait for Python's lock in between.
    """
    products, held = [], []
    with torch.no_grad():
        x = x.contiguous()
        for weight, out in zip(weights, outs, strict=True):
            assert out.shape == (x.shape[0], weight.shape[0]) and x.shape[1] == weight.shape[1]
            backend = dispatch.resolve("gemv", impl, (x,), native_obstacle=_obstacle(weight))
            if backend == "ref":
                out.copy_(gemv_ref(x, weight))
                continue
            # native code reads and writes by address
            assert out.is_cpu and out.is_contiguous() and out.dtype == torch.float32
            name, parts, numbers = _stored(weight)
            held += parts
            addresses = [*(part.data_ptr() for part in parts), *numbers]
            products.append(
                (name, x.data_ptr(), out.data_ptr(), x.shape[0], *weight.shape, addresses)
            )
        if products:
            dispatch.native.gemv(products, threads or torch.get_num_threads())


def _stored(weight: Tensor | QuantWeight) -> tuple[str, list[Tensor], tuple[int, ...]]:
    """A weight's format as the native module has it, what is read by address, and numbers."""
    if not isinstance(weight, QuantWeight):
        weight = dense_rows(weight)
        _, dtype, _, _, stride = read_args(weight)
        return "float", [weight], (dtype, stride)
    parts = [part.contiguous() for part in weight.parts.values()]
    if weight.format.name == "nf4":
        parts.append(absmax_code(parts[0].device))
    return weight.format.name, parts, ()


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
    return not dispatch.HAS_NATIVE or format.name in _native_formats(dispatch.native)


@functools.cache
def _native_formats(native: Any) -> frozenset[str]:
    """What a native module multiplies with; asked for each of a model's weights, in each step."""
    return frozenset(native.gemv_formats())
