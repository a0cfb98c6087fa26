"""A quantised weight as one thing: its format, its parts and its shape."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fluxfast.ops.device import shapes_suffice
from fluxfast.ops.linear.products_torch import adjoining
from fluxfast.ops.linear.weights import FrozenWeight
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import Quantized, format_of, row_quant_ref
from fluxfast.quant.format import Format, Parts, Shape
from fluxfast.quant.formats import FORMATS
from fluxfast.quant.rows import FLOAT_TYPES


class QuantWeight(FrozenWeight):
    """A quantised weight [N, K], as linears read it. Parts are shared, not copied.

    What it decodes to is computed in fp32 and rounded once. `impl` everywhere: "auto", "triton",
    "native" or "ref", and a ValueError where that can't do it.
    """

    shape: Shape

    def __init__(
        self, format: Format, parts: Parts, shape: Shape, members: Sequence[QuantWeight] = ()
    ) -> None:
        """members: the weights, one below the other, that this one is made of, if it is.

        Such a one is decoded by Triton's kernels only.
        """
        super().__init__(shape, next(iter(parts.values())).device)
        self.format, self.parts, self.members = format, parts, members

    @classmethod
    def of(cls, weight: Tensor, format: Format, *, impl: str = "auto") -> QuantWeight:
        """`weight` [N, K] in a format; raises ValueError as `Format.quantize` does."""
        rows, cols = weight.shape
        return cls(format, format.quantize(weight, impl=impl), (rows, cols))

    def joined(
        self, others: Sequence[FrozenWeight], /, *, codes: bool, impl: str = "auto"
    ) -> QuantWeight | None:
        like = next(iter(self.parts.values()))
        members = [w for w in (self, *others) if type(w) is QuantWeight]
        # a registered op knows the parts of a single weight
        if (is_traced(like) and not shapes_suffice()) or len(members) <= len(others):
            return None
        if not all(
            w.format is self.format and self.format.decodes_joined(w.shape) for w in members
        ):
            return None
        # no other implementation takes several at once
        task = "codes" if codes else "dequantize"
        if self.format.implementation(task, impl, like) != "triton":
            return None
        parts = {}
        for name in self.parts:
            whole = adjoining([w.parts[name] for w in members])
            if whole is None:
                return None
            parts[name] = whole
        rows = sum(w.shape[0] for w in members)
        return QuantWeight(self.format, parts, (rows, self.shape[1]), members)

    def identity(self) -> tuple[Hashable, tuple[Tensor, ...]]:
        """Its format and shape, and its parts."""
        return (self.format, self.shape), tuple(self.parts.values())

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
        self,
        out: Tensor,
        out_scale: Tensor | None = None,
        /,
        impl: str = "auto",
        *,
        transposed: Tensor | None = None,
    ) -> None:
        """Writes the weight into `out` [N, K] of a floating dtype.

        The rows of `out` may be any distance apart; its columns adjoin. With `out_scale` [N] fp32,
        `out` is int8 or float8_e4m3fn and gets what `codes` gives, and `transposed` [K, N], where
        it is given, gets the same codes in the other order. Raises ValueError on another shape,
        dtype, layout or device.
        """
        self._check(out, out_scale, transposed)
        parts, shape = self.parts, self.shape
        if is_traced(out):
            _decode_op(list(parts.values()), self.format.name, out, out_scale, transposed, impl)
            return
        if out_scale is not None and self.stores(format_of(out.dtype)):
            out.copy_(parts["packed"])
            out_scale.copy_(parts["scale"])
            _transpose(out, transposed)
            return
        task = "dequantize" if out_scale is None else "codes"
        backend = self.format.implementation(task, impl, out, out.dtype)
        if backend == "ref":
            values = self.format.dequantize_ref(parts, shape)
            _write(values, out, out_scale)
            _transpose(out, transposed)
            return
        knows_type = out_scale is not None or out.dtype in FLOAT_TYPES
        # the native module writes rows that adjoin
        if not knows_type or (backend == "native" and not out.is_contiguous()):
            dtype = out.dtype if knows_type else torch.float32
            whole = torch.empty(shape, dtype=dtype, device=out.device)
            self.decode_into(whole, out_scale, impl=impl, transposed=transposed)
            out.copy_(whole)
            return
        # both write where they are told to
        assert (
            backend == "triton"
            if self.members
            else all(
                parts[name].shape == size for name, (size, _) in self.format.layout(shape).items()
            )
        )
        dense = {name: part.contiguous() for name, part in parts.items()}
        if backend == "native":
            self.format.decode_native(dense, out, out_scale)
            _transpose(out, transposed)
        else:
            outs = [member.shape[0] for member in self.members]
            self.format.decode_triton(dense, out, out_scale, transposed, outs)

    def _check(self, out: Tensor, out_scale: Tensor | None, transposed: Tensor | None) -> None:
        """Raises ValueError unless `decode_into` can write there."""
        if out_scale is None:
            is_float = out.dtype.is_floating_point and out.dtype.itemsize > 1
            self._check_one("out", out, self.shape, out.dtype if is_float else torch.float32)
            if transposed is not None:
                raise ValueError(f"{self.format.name}: only codes are written transposed as well")
            return
        is_codes = out.dtype in [dtype for dtype, _ in CODES.values()]
        self._check_one("q", out, self.shape, out.dtype if is_codes else torch.int8)
        self._check_one("scale", out_scale, self.shape[:1], torch.float32)
        if transposed is not None:
            self._check_one("transposed", transposed, self.shape[::-1], out.dtype)

    def _check_one(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        placed = tensor.device == self.device and _has_dense_rows(tensor)
        if not placed or tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{self.format.name}: {name} must be {list(shape)} {dtype} on {self.device} with "
                f"contiguous rows, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"strides {tensor.stride()}"
            )


def _has_dense_rows(tensor: Tensor) -> bool:
    """Whether the last dimension is contiguous, and the rows of a matrix do not overlap."""
    *rows, cols = tensor.shape
    overlaps = any(n > 1 and step < cols for n, step in zip(rows, tensor.stride(), strict=False))
    return not overlaps and (tensor.stride(-1) == 1 or cols <= 1)


def _write(values: Tensor, out: Tensor, out_scale: Tensor | None) -> None:
    """Writes decoded values as `decode_into` has to."""
    if out_scale is None:
        out.copy_(values)
        return
    q, scale = row_quant_ref(values, format_of(out.dtype))
    out.copy_(q)
    out_scale.copy_(scale)


def _transpose(codes: Tensor, transposed: Tensor | None) -> None:
    """Writes codes [N, K] to `transposed` [K, N], if that is wanted."""
    if transposed is not None:
        transposed.copy_(codes.T)


def named_parts(format: Format, parts: list[Tensor] | tuple[Tensor, ...], shape: Shape) -> Parts:
    """Parts that come as a list, in the order of the format's layout, by their names."""
    return dict(zip(format.layout(shape), parts, strict=True))


def _decode(
    parts: list[Tensor],
    format: str,
    out: Tensor,
    out_scale: Tensor | None,
    transposed: Tensor | None,
    impl: str,
) -> None:
    owner, (rows, cols) = FORMATS[format], out.shape
    weight = QuantWeight(owner, named_parts(owner, parts, (rows, cols)), (rows, cols))
    weight.decode_into(out, out_scale, impl=impl, transposed=transposed)


_decode_op = Op("decode", _decode, writes=["out", "out_scale", "transposed"])
