"""Quantising rows: one scale a row, int8 or e4m3fn.

    scale = max|y| / top,  q = round(y · (1/scale)),  y ≈ q · scale

top is 127 for int8 and 448 for e4m3fn. Rounding is to nearest, halves to even. A row whose scale
would not be a normal fp32 number (all zeros, in practice) gets scale 1 and codes 0. A NaN or an
infinity anywhere in a row makes that row's scale NaN or infinite, so that it shows in the product.

`row_quant` does it to a tensor. The ops that feed an 8-bit product can also do it to their own
output: their `out=` asks for values, codes or both, and they return a `RowOutput`. Such an op
quantises its values before it rounds them to its dtype. Codes have no gradient: where an op's
backward is asked for, the gradient comes in through the values.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.parts import Parts, PerPart, dense_vectors, only
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows, divide, full_dtype
from fluxfast.text import wrong_choice

# of each format, the type of its codes and the largest
FORMATS = {"int8": (torch.int8, 127.0), "e4m3": (torch.float8_e4m3fn, 448.0)}

# the native module's numbers for the dtypes that it reads
_NATIVE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# what an op that can quantise its own output may be asked for besides "same", its values alone
CodesOut = Literal["int8", "e4m3", "both-int8", "both-e4m3"]


class Quantized(NamedTuple):
    """Codes [..., K] and a scale a row [...], fp32."""

    q: Tensor
    scale: Tensor


class RowOutput(NamedTuple):
    """What an op wrote, None where it was not asked for: values in its input's dtype; codes, and a
    scale a row in fp32.
    """

    y: Tensor | None
    q: Tensor | None
    q_scale: Tensor | None


def row_quant_ref(x: Tensor, fmt: str, col_scale: Tensor | None = None) -> Quantized:
    """The formula in plain torch, with the kernels' bits; x [..., K] is of any floating dtype."""
    dtype, top = FORMATS[fmt]
    y = x.float() if col_scale is None else x.float() * col_scale.float()
    scale = divide(y.abs().amax(-1, keepdim=True), top)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    y = y * (1 / scale)
    # no code of e4m3 is out of reach: y is within a rounding of 448, and up to 464 goes to 448
    q = y.clamp(-top, top).round().to(dtype) if fmt == "int8" else y.to(dtype)
    return Quantized(q, scale.squeeze(-1))


def format_of(dtype: torch.dtype) -> str:
    """The name in FORMATS of codes of a dtype."""
    return next(fmt for fmt, (codes, _) in FORMATS.items() if codes == dtype)


def row_quant(
    x: Tensor, fmt: str, col_scale: Tensor | None = None, impl: str = "auto"
) -> Quantized:
    """Quantises each row of x, or of x·col_scale.

    x [..., K]; fmt "int8" or "e4m3"; col_scale [K], such as a weight's row scales, which are folded
    into a gradient before dgrad. Returns codes [..., K] and scales [...] in fp32, without a
    gradient. Raises ValueError on another format, on shapes that don't fit, or if `impl` can't do
    this call.
    """
    if fmt not in FORMATS:
        raise ValueError(wrong_choice("row_quant: format", fmt, sorted(FORMATS)))
    if x.ndim == 0 or (col_scale is not None and col_scale.shape != x.shape[-1:]):
        got = None if col_scale is None else list(col_scale.shape)
        raise ValueError(
            f"row_quant: expected x [..., K] and col_scale [K], got x {list(x.shape)}, "
            f"col_scale {got}"
        )
    tensors = (x,) if col_scale is None else (x, col_scale)
    backend = dispatch.resolve("row_quant", impl, tensors)
    return forward(x.detach(), fmt, None if col_scale is None else col_scale.detach(), impl=backend)


def forward(
    x: Tensor,
    fmt: str,
    col_scale: PerPart | None = None,
    *,
    parts: Parts | None = None,
    impl: str,
) -> Quantized:
    """`row_quant` without its checks, `impl` resolved; there is no backward.

    The native module takes 16 bits, too, and rows that lie any distance apart. parts: see
    `ops.parts`; col_scale is a pair then.
    """
    if x.numel() == 0:
        return row_quant_ref(x, fmt)
    if impl == "ref" or (impl == "native" and x.dtype not in _NATIVE_TYPES):
        return row_quant_ref(x, fmt, only(col_scale))
    if is_traced(x):
        return Quantized(*_forward_op(x, fmt, col_scale, parts=parts, impl=impl))
    rows = dense_rows(x.reshape(-1, x.shape[-1]))
    if impl == "triton":
        from fluxfast_kernels import row_quant as kernels

        q, scale = kernels.row_quant(rows, fmt, col_scale=dense_vectors(col_scale), parts=parts)
    else:
        factors = only(col_scale)
        y = rows if factors is None else rows.float() * factors.float()
        q, scale = torch.empty(y.shape, dtype=FORMATS[fmt][0]), torch.empty(len(y))
        run = dispatch.native.quantize_int8 if fmt == "int8" else dispatch.native.quantize_fp8
        run(
            y.data_ptr(), _NATIVE_TYPES[y.dtype], *y.shape, y.stride(0),
            q.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return Quantized(q.view(x.shape), scale.view(x.shape[:-1]))


def _fake_forward(x: Tensor, fmt: str, **_: Any) -> list[Tensor]:
    return empty_parts(x, fmt)


_forward_op = Op("row_quant_fwd", forward, _fake_forward)


# what ops that quantise their own output share


def check_out(op: str, out: str) -> None:
    """Raises ValueError if `out` is no output mode."""
    if out != "same" and out not in get_args(CodesOut):
        raise ValueError(wrong_choice(f"{op}: out", out, ("same", *get_args(CodesOut))))


def output_of(
    values: Tensor,
    dtype: torch.dtype,
    out: str,
    col_scale: Tensor | None = None,
    into: Tensor | None = None,
    *,
    impl: str = "ref",
) -> RowOutput:
    """What `out` asks for of an op's values: rounded to `dtype`, or codes of values·col_scale.

    into: where to write the values. impl: "ref" or "native".
    """
    y = into
    if into is not None:
        if into is not values:
            into.copy_(values)
    elif out not in FORMATS:
        y = values if values.dtype == dtype else values.to(dtype)
    if out == "same":
        return RowOutput(y, None, None)
    return RowOutput(y, *forward(values.detach(), out.removeprefix("both-"), col_scale, impl=impl))


def ref_output(ref: Callable[..., Tensor], x: Tensor, *args: Any, out: str) -> RowOutput:
    """`output_of` an op's reference, whose dtype is x's."""
    return output_of(ref(x if out == "same" else x.to(full_dtype(x)), *args), x.dtype, out)


def empty_parts(
    x: Tensor, out: str, width: int | None = None, into: Tensor | None = None
) -> list[Tensor]:
    """Empty tensors for what a RowOutput holds, less `into`.

    The shape is x's; where `width` is given, that is the number of columns.
    """
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    parts = [] if out in FORMATS or into is not None else [x.new_empty(shape)]
    if out != "same":
        dtype, _ = FORMATS[out.removeprefix("both-")]
        parts += [x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=torch.float32)]
    return parts


def from_parts(parts: Iterable[Tensor], out: str, into: Tensor | None = None) -> RowOutput:
    """The RowOutput of a registered op or an autograd.Function, which return its tensors alone.

    An iterator is left at the first tensor that is not the RowOutput's.
    """
    rest = iter(parts)
    y = into if into is not None or out in FORMATS else next(rest)
    return RowOutput(y, None, None) if out == "same" else RowOutput(y, next(rest), next(rest))


def autograd_outputs(ctx: Any, output: RowOutput) -> tuple[Tensor, ...]:
    """What an autograd.Function's forward returns: the tensors there are.

    Codes and scales are marked as without a gradient.
    """
    if output.q is not None:
        ctx.mark_non_differentiable(output.q, output.q_scale)
    ctx.set_materialize_grads(False)
    return tuple(part for part in output if part is not None)


def public_output(output: RowOutput) -> Tensor | RowOutput:
    """What a public op returns: the values themselves where they are all that was asked for."""
    return output if output.y is None or output.q is not None else output.y
