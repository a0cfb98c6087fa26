"""A quantised weight as one thing: its format, its parts and its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops.linear.weights import FrozenWeight
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import Quantized, format_of
from fluxfast.quant.format import Format, Parts, Shape
from fluxfast.quant.formats import FORMATS
from fluxfast.quant.rows import FLOAT_TYPES, quantize_rows


class QuantWeight(FrozenWeight):
    """A quantised weight [N, K], as linears read it. Parts are shared, not copied.

    What it decodes to is computed in fp32 and rounded once. `impl` everywhere: "auto", "triton",
    "native" or "ref", and a ValueError where that can't do it.
    """

    shape: Shape

    def __init__(self, format: Format, parts: Parts, shape: Shape) -> None:
        super().__init__(shape, next(iter(parts.values())).device)
        self.format, self.parts = format, parts

    @classmethod
    def of(cls, weight: Tensor, format: Format, *, impl: str = "auto") -> QuantWeight:
        """`weight` [N, K] in a format; raises ValueError as `Format.quantize` does."""
        rows, cols = weight.shape
        return cls(format, format.quantize(weight, impl=impl), (rows, cols))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def to(self, dtype: torch.dtype, /, impl: str = "auto") -> Tensor:
        """The weight [N, K] in `dtype`, a new tensor."""
        out = next(iter(self.parts.values())).new_empty(self.shape, dtype=dtype)
        self.decode_into(out, impl=impl)
        return out

    def stores(self, fmt: str, /) -> bool:
        """Whether its own parts are codes and row scales of `fmt`."""
        return fmt == self.format.stored_codes

    def codes(self, fmt: str, /, impl: str = "auto") -> Quantized:
        """Codes [N, K] and row scales [N] fp32, by the formula of `ops.row_quant`.

        fmt: "int8" or "e4m3". Where it `stores(fmt)`, they are its own parts, not copies. Raises
        ValueError on another fmt.
        """
        if fmt not in CODES:
            raise ValueError(
                f"{self.format.name}: codes are one of {', '.join(CODES)}, not {fmt!r}"
            )
        if self.stores(fmt):
            return Quantized(self.parts["packed"], self.parts["scale"])
        like = next(iter(self.parts.values()))
        codes = Quantized(
            like.new_empty(self.shape, dtype=CODES[fmt][0]),
            like.new_empty(self.shape[:1], dtype=torch.float32),
        )
        self.decode_into(*codes, impl=impl)
        return codes

    def decode_into(
        self, out: Tensor, out_scale: Tensor | None = None, /, impl: str = "auto"
    ) -> None:
        """Writes the weight into `out` [N, K], contiguous and of a floating dtype.

        With `out_scale` [N] fp32, `out` is int8 or float8_e4m3fn and gets what `codes` gives.
        Raises ValueError on another shape, dtype, layout or device.
        """
        self._check(out, out_scale)
        parts, shape = self.parts, self.shape
        if is_traced(out):
            _decode_op(list(parts.values()), self.format.name, out, out_scale, impl)
            return
        if out_scale is not None and self.stores(format_of(out.dtype)):
            out.copy_(parts["packed"])
            out_scale.copy_(parts["scale"])
            return
        task = "dequantize" if out_scale is None else "codes"
        backend = self.format.implementation(task, impl, out, out.dtype)
        if backend == "ref":
            values = self.format.dequantize_ref(parts, shape)
            _write(values, out, out_scale)
            return
        if out_scale is None and out.dtype not in FLOAT_TYPES:
            values = torch.empty(shape, device=out.device)
            self.decode_into(values, impl=impl)
            out.copy_(values)
            return
        # both write where they are told to
        assert all(
            parts[name].shape == size for name, (size, _) in self.format.layout(shape).items()
        )
        decode = self.format.decode_native if backend == "native" else self.format.decode_triton
        decode({name: part.contiguous() for name, part in parts.items()}, out, out_scale)

    def _check(self, out: Tensor, out_scale: Tensor | None) -> None:
        """Raises ValueError unless `decode_into` can write there."""
        if out_scale is None:
            is_float = out.dtype.is_floating_point and out.dtype.itemsize > 1
            self._check_one("out", out, self.shape, out.dtype if is_float else torch.float32)
            return
        is_codes = out.dtype in [dtype for dtype, _ in CODES.values()]
        self._check_one("q", out, self.shape, out.dtype if is_codes else torch.int8)
        self._check_one("scale", out_scale, self.shape[:1], torch.float32)

    def _check_one(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        placed = tensor.device == self.device and tensor.is_contiguous()
        if not placed or tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{self.format.name}: {name} must be a contiguous {list(shape)} {dtype} on "
                f"{self.device}, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"strides {tensor.stride()}"
            )


def _write(values: Tensor, out: Tensor, out_scale: Tensor | None) -> None:
    """Writes decoded values as `decode_into` has to."""
    if out_scale is None:
        out.copy_(values)
        return
    q, scale = quantize_rows(values, out.dtype, "ref")
    out.copy_(q)
    out_scale.copy_(scale)


def named_parts(format: Format, parts: list[Tensor] | tuple[Tensor, ...], shape: Shape) -> Parts:
    """Parts that come as a list, in the order of the format's layout, by their names."""
    return dict(zip(format.layout(shape), parts, strict=True))


def _decode(
    parts: list[Tensor], format: str, out: Tensor, out_scale: Tensor | None, impl: str
) -> None:
    owner, (rows, cols) = FORMATS[format], out.shape
    weight = QuantWeight(owner, named_parts(owner, parts, (rows, cols)), (rows, cols))
    weight.decode_into(out, out_scale, impl=impl)


_decode_op = Op("decode", _decode, writes=["out", "out_scale"])
