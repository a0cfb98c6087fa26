"""What a storage format is: a way to keep a frozen linear's weight [N, K] in few bits, and to get it back.

A quantised weight is a dict of plain tensors, its parts: codes, and whatever scales them. Quantising and dequantising are done
in fp32 with IEEE arithmetic in a stated order, so that every implementation gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Parts = dict[str, Tensor]
# rows (output features) and columns (input features) of the weight
Shape = tuple[int, int]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# the least fp32 number that keeps all its bits
LEAST_NORMAL = torch.finfo(torch.float32).tiny


class Format:
    """One storage format. Subclasses say what the parts are and how they come about; instances hold no state."""

    name: ClassVar[str]
    # with all scales, at FLUX.1's sizes
    bits_per_weight: ClassVar[float]
    # the part in which a NaN or an infinity anywhere in the weight leaves a NaN or an infinity
    witness: ClassVar[str] = "scale"

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight of `shape`."""
        raise NotImplementedError

    def quantize_ref(self, weight: Tensor) -> Parts:
        """The parts of weight [N, K] fp32, in plain torch."""
        raise NotImplementedError

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The weight [N, K] fp32, in plain torch."""
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> Parts:
        """The parts of weight [N, K], any floating dtype and strides; fp64 is rounded to fp32 first.

        Raises ValueError on another shape or dtype, and on a NaN or an infinity, naming where it is.
        """
        if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in FLOATS:
            raise ValueError(
                f"{self.name}: expected a weight [out, in] of a floating dtype, got {list(weight.shape)} {weight.dtype}"
            )
        parts = self.quantize_ref(weight.detach().float())
        if not parts[self.witness].isfinite().all():
            row, col = (~weight.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{self.name}: the weight {list(weight.shape)} holds {weight[row, col].item()} at [{row}, {col}]; "
                "a weight must be finite to be quantised: check the checkpoint that it came from"
            )
        return parts

    def dequantize(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`: computed in fp32, rounded once."""
        return self.dequantize_ref(parts, shape).to(dtype)

    def to_int8(self, parts: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        """The weight for an 8-bit product: codes [N, K] int8 and a scale per row [N] fp32."""
        return quantize_rows(self.dequantize(parts, shape, torch.float32), torch.int8)

    def empty(self, shape: Shape, device: torch.device | str | None = None) -> Parts:
        """Uninitialised parts of a weight of `shape`, to load into."""
        return {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in self.layout(shape).items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True)
class QuantWeight:
    """A quantised weight [N, K]; `dtype` is the one that its reader computes in unless it says otherwise."""

    format: Format
    parts: Parts
    shape: Shape
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype`, a new tensor."""
        return self.format.dequantize(self.parts, self.shape, dtype or self.dtype)

    def to_int8(self) -> tuple[Tensor, Tensor]:
        """Codes [N, K] int8 and row scales [N] fp32 for an 8-bit product; of an int8 weight its own parts, not copies."""
        return self.format.to_int8(self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, K] of `dtype` (int8 or float8_e4m3fn) and a scale per row [N] fp32 of weight [N, K] fp32.

    scale = max|w| / top, code = round(w · (1/scale)), halves to even. A row whose scale would not be a normal number gets 1.
    """
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # a tensor, because on a GPU torch divides by a plain number as a product with its inverse
    scale = weight.abs().amax(1) / torch.tensor(top, device=weight.device)
    scale = torch.where(scale < LEAST_NORMAL, 1.0, scale)
    codes = weight * (1 / scale)[:, None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale
