"""A quantised weight as one thing: its format, parts and shape; and its decoders as custom ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast.ops import registration
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import Quantized
from fluxfast.quant.format import Format, Parts, Shape


def _named(parts: list[Tensor], format: str, shape: Shape) -> tuple[Format, Parts]:
    # the registry hands out what this module defines, so it can't be imported before
    from fluxfast.quant import FORMATS

    return FORMATS[format], dict(zip(FORMATS[format].layout(shape), parts, strict=True))


def _dequantize(
    parts: list[Tensor], format: str, rows: int, cols: int, dtype: torch.dtype, impl: str
) -> Tensor:
    owner, named = _named(parts, format, (rows, cols))
    return owner.dequantize(named, (rows, cols), dtype, impl=impl)


def _decode_into(parts: list[Tensor], format: str, out: Tensor, impl: str) -> None:
    owner, named = _named(parts, format, (out.shape[0], out.shape[1]))
    owner.decode_into(named, out, impl=impl)


def _codes(
    parts: list[Tensor], format: str, rows: int, cols: int, fmt: str, impl: str
) -> tuple[Tensor, Tensor]:
    owner, named = _named(parts, format, (rows, cols))
    codes = owner.codes(named, (rows, cols), fmt, impl=impl)
    return codes.q, codes.scale


def _codes_into(parts: list[Tensor], format: str, q: Tensor, scale: Tensor, impl: str) -> None:
    owner, named = _named(parts, format, (q.shape[0], q.shape[1]))
    owner.codes_into(named, q, scale, impl=impl)


_dequantize_op = torch.library.custom_op("fluxfast::dequantize", _dequantize, mutates_args=())
_decode_into_op = torch.library.custom_op(
    "fluxfast::decode_into", _decode_into, mutates_args=("out",)
)
_codes_op = torch.library.custom_op("fluxfast::codes", _codes, mutates_args=())
_codes_into_op = torch.library.custom_op(
    "fluxfast::codes_into", _codes_into, mutates_args=("q", "scale")
)


@_dequantize_op.register_fake
def _(
    parts: list[Tensor], format: str, rows: int, cols: int, dtype: torch.dtype, impl: str
) -> Tensor:
    return parts[0].new_empty((rows, cols), dtype=dtype)


@_decode_into_op.register_fake
def _(parts: list[Tensor], format: str, out: Tensor, impl: str) -> None:
    return None


@_codes_op.register_fake
def _(
    parts: list[Tensor], format: str, rows: int, cols: int, fmt: str, impl: str
) -> tuple[Tensor, Tensor]:
    return parts[0].new_empty((rows, cols), dtype=CODES[fmt][0]), parts[0].new_empty(
        rows, dtype=torch.float32
    )


@_codes_into_op.register_fake
def _(parts: list[Tensor], format: str, q: Tensor, scale: Tensor, impl: str) -> None:
    return None


@dataclass(frozen=True)
class QuantWeight:
    """A quantised weight [N, K]; `dtype` is the one that its reader computes in unless it says
    otherwise.

    What it decodes to is computed in fp32 and rounded once. `impl` everywhere: "auto", "triton",
    "native" or "ref", and a ValueError where that can't do it.
    """

    format: Format
    parts: Parts
    shape: Shape
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
        """The weight [N, K] in `dtype`, a new tensor."""
        return self._run(_dequantize, _dequantize_op, *self.shape, dtype or self.dtype, impl)

    def decode_into(self, out: Tensor, impl: str = "auto") -> None:
        """Writes the weight into `out` [N, K], contiguous, in its floating dtype: rows of a scratch
        that linears share.

        Raises ValueError on another shape, dtype, layout or device.
        """
        self._check(
            "out",
            out,
            self.shape,
            out.dtype if out.dtype.is_floating_point and out.dtype.itemsize > 1 else self.dtype,
        )
        self._run(_decode_into, _decode_into_op, out, impl)

    def codes(self, fmt: str, impl: str = "auto") -> Quantized:
        """Codes [N, K] and row scales [N] fp32 for an 8-bit product, fmt "int8" or "e4m3", by the
        formula of `ops.row_quant`.

        Of an int8 weight its own parts, not copies; of an fp8_e4m3 one likewise. Raises ValueError
        on another fmt.
        """
        if fmt not in CODES or fmt == self.format.stored_codes:
            return self.format.codes(self.parts, self.shape, fmt, impl=impl)
        return Quantized(*self._run(_codes, _codes_op, *self.shape, fmt, impl))

    def codes_into(self, q: Tensor, scale: Tensor, impl: str = "auto") -> None:
        """Writes what `codes` gives into q [N, K], int8 or float8_e4m3fn, and scale [N] fp32, both
        contiguous.

        Raises ValueError on another shape, dtype, layout or device.
        """
        dtypes = [dtype for dtype, _ in CODES.values()]
        self._check("q", q, self.shape, q.dtype if q.dtype in dtypes else torch.int8)
        self._check("scale", scale, self.shape[:1], torch.float32)
        self._run(_codes_into, _codes_into_op, q, scale, impl)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def _run(self, plain: Callable[..., Any], registered: Callable[..., Any], *args: Any) -> Any:
        parts = list(self.parts.values())
        return registration.launcher(parts[0], plain, registered)(parts, self.format.name, *args)

    def _check(self, name: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        device = self.parts["packed"].device
        if (
            out.shape != shape
            or out.dtype != dtype
            or out.device != device
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"{self.format.name}: {name} must be a contiguous {list(shape)} {dtype} on "
                f"{device}, "
                f"got {list(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
            )
