"""fp8_e4m3: a float8_e4m3fn a weight, a scale an output row.

w = value · scale, scale = max|w| / 448
"""

from torch import Tensor

from fluxfast.quant.format import Parts
from fluxfast.quant.row_format import RowFormat


class Fp8E4M3(RowFormat):
    """parts: packed [N, K] float8_e4m3fn, scale [N] fp32."""

    name, native_name, stored_codes = "fp8_e4m3", "fp8", "e4m3"

    def quantize_triton(self, weight: Tensor) -> Parts:
        from fluxfast_kernels.quantize_e4m3 import quantize_e4m3

        packed, scale = quantize_e4m3(weight)
        return {"packed": packed, "scale": scale}


FP8_E4M3 = Fp8E4M3()
