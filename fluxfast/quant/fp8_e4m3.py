"""fp8_e4m3: a float8_e4m3fn a weight, a scale an output row. w = value · scale, scale = max|w| / 448."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fluxfast.ops import _impl
from fluxfast.quant._format import Format, Parts, Shape
from fluxfast.quant._rows import quantize_rows, write_args


class Fp8E4M3(Format):
    """parts: packed [N, K] float8_e4m3fn, scale [N] fp32."""

    name = "fp8_e4m3"
    bits_per_weight = 8.01

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"packed": (shape, torch.float8_e4m3fn), "scale": (shape[:1], torch.float32)}

    def quantize_ref(self, weight: Tensor) -> Parts:
        packed, scale = quantize_rows(weight, torch.float8_e4m3fn, "ref")
        return {"packed": packed, "scale": scale}

    def quantize_native(self, weight: Tensor) -> Parts:
        packed, scale = quantize_rows(weight, torch.float8_e4m3fn, "native")
        return {"packed": packed, "scale": scale}

    def quantize_triton(self, weight: Tensor) -> Parts:
        from fluxfast_kernels.quantize_e4m3 import quantize_e4m3

        packed, scale = quantize_e4m3(weight)
        return {"packed": packed, "scale": scale}

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return parts["packed"].float() * parts["scale"][:, None]

    def dequantize_native(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        packed, scale = parts["packed"].data_ptr(), parts["scale"].data_ptr()
        _impl.native.dequantize_fp8(*write_args(out), packed, scale, torch.get_num_threads())

    def dequantize_triton(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        from fluxfast_kernels.dequant_rows import dequant_rows

        return dequant_rows(parts["packed"], parts["scale"], dtype)


FP8_E4M3 = Fp8E4M3()
