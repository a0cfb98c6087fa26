"""What a storage format is: a way to keep a frozen linear's weight [N, K] in few bits, and to get
it back.

A quantised weight is a dict of plain tensors, its parts: codes, and whatever scales them.
Quantising and dequantising are done in fp32 with IEEE arithmetic in a stated order, so that every
implementation (`impl`: triton, native, ref) gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import Quantized
from fluxfast.ops.tensors import dense_rows
from fluxfast.quant import gpu
from fluxfast.quant.rows import FLOAT_TYPES, quantize_rows

Parts = dict[str, Tensor]
# rows (output features) and columns (input features) of the weight
Shape = tuple[int, int]


class Format:
    """One storage format. Subclasses say what the parts are and how they come about; instances hold
    no state.
    """

    name: ClassVar[str]
    # with all scales, at FLUX.1's sizes
    bits_per_weight: ClassVar[float]
    # the part in which a NaN or an infinity anywhere in the weight leaves a NaN or an infinity
    witness: ClassVar[str] = "scale"
    # the key of CODES whose codes and scales the parts packed and scale are
    stored_codes: ClassVar[str | None] = None
    # what the native module does on a GPU, too: "quantize"; "dequantize", to bf16
    gpu_tasks: ClassVar[tuple[str, ...]] = ()

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight of `shape`."""
        raise NotImplementedError

    def quantize_ref(self, weight: Tensor) -> Parts:
        """The parts of weight [N, K] fp32, in plain torch: the definition of the format."""
        raise NotImplementedError

    def quantize_native(self, weight: Tensor) -> Parts:
        """The same by the native module, of a weight in a dtype of FLOAT_TYPES whose columns are
        contiguous; on the CPU, or on a GPU if "quantize" is in gpu_tasks.
        """
        raise NotImplementedError

    def quantize_triton(self, weight: Tensor) -> Parts:
        """The same by Triton's kernels."""
        raise NotImplementedError

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The weight [N, K] fp32, in plain torch."""
        raise NotImplementedError

    def decode_native(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        """The same by the native module into `out` [N, K], contiguous: values, in a dtype of
        FLOAT_TYPES; or codes, in one of CODES, and their scales into `out_scale` [N] fp32. On the
        CPU; on a GPU values in bf16, if "dequantize" is in gpu_tasks.
        """
        raise NotImplementedError

    def decode_triton(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        """The same by Triton's kernels."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, *, impl: str = "auto") -> Parts:
        """The parts of weight [N, K], any floating dtype and strides, on its device; fp64 is
        rounded to fp32 first.

        Raises ValueError on another shape or dtype, on a NaN or an infinity, naming where it is,
        and on an `impl` that can't.
        """
        if (
            weight.ndim != 2
            or weight.numel() == 0
            or weight.dtype not in (*FLOAT_TYPES, torch.float64)
        ):
            raise ValueError(
                f"{self.name}: expected a weight [out, in] of a floating dtype, got "
                f"{list(weight.shape)} {weight.dtype}"
            )
        backend = self._implementation("quantize", impl, weight)
        rows = weight.detach().to(
            weight.dtype if weight.dtype in FLOAT_TYPES and backend != "ref" else torch.float32
        )
        run = {
            "ref": self.quantize_ref,
            "native": self.quantize_native,
            "triton": self.quantize_triton,
        }[backend]
        parts = run(dense_rows(rows))
        if not parts[self.witness].isfinite().all():
            raise ValueError(
                f"{self.name}: {_why_not_finite(weight)}; check the checkpoint that it came from"
            )
        return parts

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, *, impl: str = "auto"
    ) -> Tensor:
        """The weight [N, K] in `dtype`: computed in fp32, rounded once. Raises ValueError on an
        `impl` that can't.
        """
        out = torch.empty(shape, dtype=dtype, device=parts["packed"].device)
        self.decode_into(parts, out, impl=impl)
        return out

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor, *, impl: str = "auto") -> None:
        """Writes the weight into `out` [N, K], contiguous, of a floating dtype: some rows of a
        larger tensor, for one.

        Raises ValueError on an `impl` that can't.
        """
        backend = self._implementation("dequantize", impl, parts["packed"], out.dtype)
        if backend == "ref":
            out.copy_(self.dequantize_ref(parts, _shape_of(out)))
        elif out.dtype in FLOAT_TYPES:
            self._decode(backend, parts, out, None)
        else:
            values = torch.empty(out.shape, device=out.device)
            self._decode(backend, parts, values, None)
            out.copy_(values)

    def codes(
        self, parts: Mapping[str, Tensor], shape: Shape, fmt: str, *, impl: str = "auto"
    ) -> Quantized:
        """The weight for an 8-bit product: codes [N, K] and a scale a row [N] fp32, by the formula
        of `ops.row_quant`.

        fmt: "int8" or "e4m3". Of a format that stores just these, they are its own parts, not
        copies. Raises ValueError on another fmt, and on an `impl` that can't.
        """
        if fmt not in CODES:
            raise ValueError(f"{self.name}: codes are one of {', '.join(CODES)}, not {fmt!r}")
        if fmt == self.stored_codes:
            return Quantized(parts["packed"], parts["scale"])
        device = parts["packed"].device
        codes = Quantized(
            torch.empty(shape, dtype=CODES[fmt][0], device=device),
            torch.empty(shape[0], device=device),
        )
        self.codes_into(parts, *codes, impl=impl)
        return codes

    def codes_into(
        self, parts: Mapping[str, Tensor], q: Tensor, scale: Tensor, *, impl: str = "auto"
    ) -> None:
        """Writes what `codes` gives into q [N, K], int8 or float8_e4m3fn, and scale [N] fp32, both
        contiguous.

        Raises ValueError on an `impl` that can't.
        """
        if self.stored_codes is not None and q.dtype == CODES[self.stored_codes][0]:
            q.copy_(parts["packed"])
            scale.copy_(parts["scale"])
            return
        backend = self._implementation("codes", impl, parts["packed"])
        if backend == "ref":
            codes, scales = quantize_rows(self.dequantize_ref(parts, _shape_of(q)), q.dtype, "ref")
            q.copy_(codes)
            scale.copy_(scales)
        else:
            self._decode(backend, parts, q, scale)

    def _decode(
        self,
        backend: dispatch.Backend,
        parts: Mapping[str, Tensor],
        out: Tensor,
        out_scale: Tensor | None,
    ) -> None:
        # both write where they are told to
        assert all(
            parts[name].shape == shape for name, (shape, _) in self.layout(_shape_of(out)).items()
        )
        assert out.is_contiguous() and out.device == parts["packed"].device
        if out_scale is not None:
            assert (
                out_scale.is_contiguous()
                and out_scale.shape == out.shape[:1]
                and out_scale.dtype == torch.float32
            )
        run = self.decode_native if backend == "native" else self.decode_triton
        run({name: part.contiguous() for name, part in parts.items()}, out, out_scale)

    def empty(self, shape: Shape, device: torch.device | str | None = None) -> Parts:
        """Uninitialised parts of a weight of `shape`, to load into."""
        return {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in self.layout(shape).items()
        }

    def _implementation(
        self, task: str, impl: str, tensor: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> dispatch.Backend:
        if impl == "native" and tensor.is_cuda:
            why = gpu.obstacle()
            if task not in self.gpu_tasks:
                why = f"on a GPU the native module doesn't {task} this format"
            elif dtype != torch.bfloat16:
                why = f"on a GPU the native module decodes to torch.bfloat16, not to {dtype}"
            if why is not None:
                raise ValueError(
                    f"{self.name}.{task}: impl='native' can't do this call: {why}; use "
                    "impl='auto' or impl='ref'"
                )
            return "native"
        # what is computed is fp32, whatever it is stored in
        return dispatch.resolve(
            f"{self.name}.{task}", impl, (tensor.new_empty(0, dtype=torch.float32),)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _shape_of(tensor: Tensor) -> Shape:
    rows, cols = tensor.shape
    return rows, cols


def _why_not_finite(weight: Tensor) -> str:
    places = (~weight.isfinite()).nonzero()
    if len(places) == 0:
        return (
            f"the weight {list(weight.shape)} reaches {weight.abs().max().item():g}, which is "
            "too large for fp32 scales"
        )
    row, col = places[0].tolist()
    return (
        f"the weight {list(weight.shape)} holds {weight[row, col].item()} at [{row}, {col}], "
        "and must be finite"
    )
