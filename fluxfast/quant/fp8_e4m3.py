"""fp8_e4m3: a float8_e4m3fn a weight, a scale an output row. w = value · scale, scale = max|w| / 448."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fluxfast.quant._format import Format, Parts, Shape
from fluxfast.quant._rows import decode, quantize_rows


class Fp8E4M3(Format):
    """parts: packed [N, K] float8_e4m3fn, scale [N] fp32."""

    name = "fp8_e4m3"
    bits_per_weight = 8.01
    gpu_tasks = ("quantize",)
    stored_codes = "e4m3"

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

    def decode_native(self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None) -> None:
        decode("fp8", out, out_scale, (parts["packed"], parts["scale"]))

    def decode_triton(self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None) -> None:
        from fluxfast_kernels.dequant_rows import dequant_rows

        dequant_rows(parts["packed"], parts["scale"], out, out_scale)


FP8_E4M3 = Fp8E4M3()
