"""What a storage format is: a way to keep a frozen linear's weight [N, K] in few bits, and to get it back.

A quantised weight is a dict of plain tensors, its parts: codes, and whatever scales them. Quantising and dequantising are done
in fp32 with IEEE arithmetic in a stated order, so that every implementation (`impl`: triton, native, ref) gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fluxfast.ops import _impl
from fluxfast.quant._rows import FLOAT_TYPES, quantize_rows

Parts = dict[str, Tensor]
# rows (output features) and columns (input features) of the weight
Shape = tuple[int, int]


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
        """The parts of weight [N, K] fp32, in plain torch: the definition of the format."""
        raise NotImplementedError

    def quantize_native(self, weight: Tensor) -> Parts:
        """The same by the native module, of a weight on the CPU in a dtype of FLOAT_TYPES whose columns are contiguous."""
        raise NotImplementedError

    def quantize_triton(self, weight: Tensor) -> Parts:
        """The same by Triton's kernels."""
        raise NotImplementedError

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The weight [N, K] fp32, in plain torch."""
        raise NotImplementedError

    def dequantize_native(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """The same by the native module, into `out` [N, K]: contiguous, on the CPU, in a dtype of FLOAT_TYPES."""
        raise NotImplementedError

    def dequantize_triton(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The same by Triton's kernels in a dtype of FLOAT_TYPES, and None; or, in int8, what `to_int8` gives."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, *, impl: str = "auto") -> Parts:
        """The parts of weight [N, K], any floating dtype and strides, on its device; fp64 is rounded to fp32 first.

        Raises ValueError on another shape or dtype, on a NaN or an infinity, naming where it is, and on an `impl` that can't.
        """
        if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in (*FLOAT_TYPES, torch.float64):
            raise ValueError(
                f"{self.name}: expected a weight [out, in] of a floating dtype, got {list(weight.shape)} {weight.dtype}"
            )
        backend = self._implementation("quantize", impl, weight)
        rows = weight.detach().to(weight.dtype if weight.dtype in FLOAT_TYPES and backend != "ref" else torch.float32)
        run = {"ref": self.quantize_ref, "native": self.quantize_native, "triton": self.quantize_triton}[backend]
        parts = run(_impl.dense_rows(rows))
        if not parts[self.witness].isfinite().all():
            raise ValueError(f"{self.name}: {_why_not_finite(weight)}; check the checkpoint that it came from")
        return parts

    def dequantize(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
        """The weight [N, K] in `dtype`: computed in fp32, rounded once. Raises ValueError on an `impl` that can't."""
        backend = self._implementation("dequantize", impl, parts["packed"])
        if backend == "ref":
            return self.dequantize_ref(parts, shape).to(dtype)
        written = dtype if dtype in FLOAT_TYPES else torch.float32
        dense = {name: part.contiguous() for name, part in parts.items()}
        if backend == "triton":
            return self.dequantize_triton(dense, shape, written)[0].to(dtype)
        out = torch.empty(shape, dtype=written)
        self.dequantize_native(dense, out)
        return out.to(dtype)

    def to_int8(self, parts: Mapping[str, Tensor], shape: Shape, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """The weight for an 8-bit product: codes [N, K] int8 and a scale per row [N] fp32, as `_rows` says."""
        backend = self._implementation("to_int8", impl, parts["packed"])
        if backend == "triton":
            codes, scale = self.dequantize_triton({name: part.contiguous() for name, part in parts.items()}, shape, torch.int8)
            assert scale is not None
            return codes, scale
        return quantize_rows(self.dequantize(parts, shape, torch.float32, impl=backend), torch.int8, backend)

    def empty(self, shape: Shape, device: torch.device | str | None = None) -> Parts:
        """Uninitialised parts of a weight of `shape`, to load into."""
        return {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in self.layout(shape).items()}

    def _implementation(self, task: str, impl: str, tensor: Tensor) -> _impl.Backend:
        # what is computed is fp32, whatever it is stored in
        return _impl.resolve(f"{self.name}.{task}", impl, (tensor.new_empty(0, dtype=torch.float32),))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _why_not_finite(weight: Tensor) -> str:
    places = (~weight.isfinite()).nonzero()
    if len(places) == 0:
        return f"the weight {list(weight.shape)} reaches {weight.abs().max().item():g}, which is too large for fp32 scales"
    row, col = places[0].tolist()
    return f"the weight {list(weight.shape)} holds {weight[row, col].item()} at [{row}, {col}], and must be finite"
