"""Codes with one scale a row, and weights as the native module takes them.

int8, fp8_e4m3 and the 8-bit product share the codes:

    scale = max|w| / top,  code = round(w · (1/scale)), halves to even

top is 127 for int8 and 448 for float8_e4m3fn. A row whose scale would not be a normal number gets
scale 1.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.quant import gpu

# the native module's numbers for the dtypes that it reads and writes
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# and for the dtypes of codes
CODE_TYPES = {torch.int8: 0, torch.float8_e4m3fn: 1}
# the least fp32 number that keeps all its bits
LEAST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, K] of `dtype` (int8 or float8_e4m3fn) and scales [N] fp32, by the native module.

    weight [N, K], on the CPU or a GPU, is of a dtype of FLOAT_TYPES and has contiguous columns.
    """
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    if weight.is_cuda:
        outputs = (codes.data_ptr(), CODE_TYPES[dtype], scale.data_ptr())
        dispatch.native.gpu_row_quant(*read_args(weight), 0, *outputs, *gpu.queue(weight))
    else:
        encode("int8" if dtype == torch.int8 else "fp8", weight, (codes, scale))
    return codes, scale


def read_args(weight: Tensor) -> tuple[int, int, int, int, int]:
    """A weight for the native module to read.

    Address, type, rows, columns, and elements from one row to the next.
    """
    return weight.data_ptr(), FLOAT_TYPES[weight.dtype], *weight.shape, weight.stride(0)


def encode(name: str, weight: Tensor, parts: Iterable[Tensor]) -> None:
    """Calls the native module's quantiser of the format that it knows as `name`, on the CPU."""
    addresses = (part.data_ptr() for part in parts)
    getattr(dispatch.native, f"quantize_{name}")(
        *read_args(weight), *addresses, torch.get_num_threads()
    )


def decode(name: str, out: Tensor, out_scale: Tensor | None, parts: Sequence[Tensor]) -> None:
    """Calls the native module's decoder of the format that it knows as `name`.

    out and out_scale as `Format.decode_native` takes them.
    """
    if out.is_cuda:
        addresses = (part.data_ptr() for part in parts)
        getattr(dispatch.native, f"gpu_dequantize_{name}")(
            out.data_ptr(), *out.shape, *addresses, *gpu.queue(out)
        )
        return
    rest = (*out.shape, *(part.data_ptr() for part in parts), torch.get_num_threads())
    if out_scale is None:
        getattr(dispatch.native, f"dequantize_{name}")(
            out.data_ptr(), FLOAT_TYPES[out.dtype], *rest
        )
    else:
        getattr(dispatch.native, f"codes_from_{name}")(
            out.data_ptr(), CODE_TYPES[out.dtype], out_scale.data_ptr(), *rest
        )
