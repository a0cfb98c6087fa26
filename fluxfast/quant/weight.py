"""A quantised weight as one thing: its format, parts and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxfast.ops import _impl
from fluxfast.quant._format import Format, Parts, Shape


def _dequantize(parts: list[Tensor], format: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    # the registry hands out what this module defines, so it can't be imported before
    from fluxfast.quant import FORMATS

    names = FORMATS[format].layout((rows, cols))
    return FORMATS[format].dequantize(dict(zip(names, parts, strict=True)), (rows, cols), dtype)


_dequantize_op = torch.library.custom_op("fluxfast::dequantize", _dequantize, mutates_args=())


@_dequantize_op.register_fake
def _(parts: list[Tensor], format: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((rows, cols), dtype=dtype)


@dataclass(frozen=True)
class QuantWeight:
    """A quantised weight [N, K]; `dtype` is the one that its reader computes in unless it says otherwise."""

    format: Format
    parts: Parts
    shape: Shape
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype`, a new tensor."""
        parts = list(self.parts.values())
        run = _impl.launcher(parts[0], _dequantize, _dequantize_op)
        return run(parts, self.format.name, *self.shape, dtype or self.dtype)

    def to_int8(self) -> tuple[Tensor, Tensor]:
        """Codes [N, K] int8 and row scales [N] fp32 for an 8-bit product; of an int8 weight its own parts, not copies."""
        return self.format.to_int8(self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())
