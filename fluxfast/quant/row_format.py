"""What int8 and fp8_e4m3 share: a code a weight, a scale an output row. w = code · scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant.format import Format, Parts, Shape
from fluxfast.quant.rows import decode, quantize_rows


class RowFormat(Format):
    """parts: packed [N, K], of the dtype that `stored_codes` names, scale [N] fp32."""

    gpu_tasks = ("quantize",)
    stored_codes: ClassVar[str]
    # as the native module calls it
    native_name: ClassVar[str]

    @property
    def dtype(self) -> torch.dtype:
        return CODES[self.stored_codes][0]

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"packed": (shape, self.dtype), "scale": (shape[:1], torch.float32)}

    def quantize_ref(self, weight: Tensor) -> Parts:
        packed, scale = row_quant_ref(weight, self.stored_codes)
        return {"packed": packed, "scale": scale}

    def quantize_native(self, weight: Tensor) -> Parts:
        packed, scale = quantize_rows(weight, self.dtype)
        return {"packed": packed, "scale": scale}

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return parts["packed"].float() * parts["scale"][:, None]

    def decode_native(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        decode(self.native_name, out, out_scale, (parts["packed"], parts["scale"]))

    def decode_triton(
        self,
        parts: Mapping[str, Tensor],
        out: Tensor,
        out_scale: Tensor | None,
        transposed: Tensor | None,
        outs: Sequence[int],
    ) -> None:
        from fluxfast_kernels.dequant_rows import dequant_rows

        dequant_rows(parts["packed"], parts["scale"], out, out_scale, transposed)

    def decodes_joined(self, shape: Shape) -> bool:
        return True
