"""Quantising rows: one scale a row, int8 or e4m3fn; alone, and as the output mode of the ops that
feed a quantised matmul.

    scale = max|y| / top,  q = round(y · (1/scale)),  y ≈ q · scale      top = 127 for int8, 448 for e4m3fn

Rounding is to nearest, halves to even. A row whose scale would not be a normal fp32 number (all
zeros, in practice) gets scale 1 and codes 0. A NaN or an infinity anywhere in a row makes that
row's scale NaN or infinite, so it shows in the product.

Codes have no gradient. An op that writes them quantises its values before it rounds them to its
dtype, and its backward is that of the values: where both are asked for, the gradient comes in
through the values.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fluxfast.ops import dispatch, registration
from fluxfast.ops.tensors import dense_rows, full_dtype

# of each format, the type of its codes and the largest
FORMATS = {"int8": (torch.int8, 127.0), "e4m3": (torch.float8_e4m3fn, 448.0)}

# the native module's numbers for the dtypes that it reads
_NATIVE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# what an op that can quantise its own output is asked for, besides "same" (its values alone): codes
# alone, or both
CodesOut = Literal["int8", "e4m3", "both-int8", "both-e4m3"]


class Quantized(NamedTuple):
    """Codes [..., K] and a scale a row [...], fp32."""

    q: Tensor
    scale: Tensor


class RowOutput(NamedTuple):
    """What an op wrote: values in its input's dtype, or None; codes, and a scale a row in fp32, or
    None.
    """

    y: Tensor | None
    q: Tensor | None
    q_scale: Tensor | None


def row_quant_ref(x: Tensor, fmt: str, col_scale: Tensor | None = None) -> Quantized:
    """The formula in plain torch, bit for bit that of the kernels; x [..., K] of any floating
    dtype, col_scale [K].
    """
    dtype, top = FORMATS[fmt]
    y = x.float() if col_scale is None else x.float() * col_scale.float()
    scale = y.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    y = y * (1 / scale)
    # no code of e4m3 is out of reach: y is within a rounding of 448, and up to 464 goes to 448
    q = y.clamp(-top, top).round().to(dtype) if fmt == "int8" else y.to(dtype)
    return Quantized(q, scale.squeeze(-1))


def row_quant_fwd(x: Tensor, fmt: str, col_scale: Tensor | None, impl: str) -> list[Tensor]:
    """Codes and scales of x [M, K]; the launcher alone."""
    x, col_scale = dense_rows(x), None if col_scale is None else dense_rows(col_scale)
    if impl == "triton":
        from fluxfast_kernels.row_quant import row_quant as launch

        return list(launch(x, fmt, col_scale=col_scale))
    y = x if col_scale is None else x.float() * col_scale.float()
    q, scale = torch.empty(y.shape, dtype=FORMATS[fmt][0]), torch.empty(len(y), dtype=torch.float32)
    run = dispatch.native.quantize_int8 if fmt == "int8" else dispatch.native.quantize_fp8
    run(
        y.data_ptr(),
        _NATIVE_TYPES[y.dtype],
        *y.shape,
        y.stride(0),
        q.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return [q, scale]


_fwd_op = registration.register(row_quant_fwd)


@_fwd_op.register_fake
def _(x: Tensor, fmt: str, col_scale: Tensor | None, impl: str) -> list[Tensor]:
    return [
        x.new_empty(x.shape, dtype=FORMATS[fmt][0]),
        x.new_empty(x.shape[:1], dtype=torch.float32),
    ]


def row_quant(
    x: Tensor, fmt: str, col_scale: Tensor | None = None, impl: str = "auto"
) -> Quantized:
    """Quantises each row of x, or of x·col_scale: a weight's row scales, folded into the gradient
    before dgrad.

    x [..., K], col_scale [K]; fmt "int8" or "e4m3". Returns codes [..., K] and scales [...] in
    fp32. No gradient. Raises ValueError on another format, on shapes that don't fit, or if `impl`
    can't do this call.
    """
    if fmt not in FORMATS:
        raise ValueError(f"row_quant: the format is one of {sorted(FORMATS)}, not {fmt!r}")
    if x.ndim == 0 or (col_scale is not None and col_scale.shape != x.shape[-1:]):
        got = None if col_scale is None else list(col_scale.shape)
        raise ValueError(
            f"row_quant: expected x [..., K] and col_scale [K], got x {list(x.shape)}, "
            f"col_scale {got}"
        )
    tensors = (x,) if col_scale is None else (x, col_scale)
    backend = dispatch.resolve("row_quant", impl, tensors)
    return forward(x.detach(), fmt, None if col_scale is None else col_scale.detach(), impl=backend)


def forward(x: Tensor, fmt: str, col_scale: Tensor | None = None, *, impl: str) -> Quantized:
    """`row_quant` without its checks, `impl` resolved; there is no backward. Native code takes 16
    bits, too.
    """
    if impl == "ref" or (impl == "native" and x.dtype not in _NATIVE_TYPES) or x.numel() == 0:
        return row_quant_ref(x, fmt, col_scale)
    rows = x.reshape(-1, x.shape[-1])
    q, scale = registration.launcher(x, row_quant_fwd, _fwd_op)(rows, fmt, col_scale, impl)
    return Quantized(q.view(x.shape), scale.view(x.shape[:-1]))


def check_out(op: str, out: str) -> None:
    """Raises ValueError if `out` is no output mode."""
    if out != "same" and out not in get_args(CodesOut):
        raise ValueError(f"{op}: out must be one of {('same', *get_args(CodesOut))}, not {out!r}")


def values_and_codes(
    values: Tensor,
    dtype: torch.dtype,
    out: str,
    col_scale: Tensor | None = None,
    into: Tensor | None = None,
    *,
    impl: str = "ref",
) -> list[Tensor]:
    """Of an op's values before rounding: those of values in `dtype`, codes and scales that `out`
    asks for.

    The codes are those of values·col_scale. With `into` the values are written there and not
    returned. impl: "ref" or "native".
    """
    parts = []
    if into is not None:
        if into is not values:
            into.copy_(values)
    elif out not in FORMATS:
        parts.append(values.to(dtype))
    if out != "same":
        parts += forward(values.detach(), out.removeprefix("both-"), col_scale, impl=impl)
    return parts


def ref_outputs(ref: Callable[..., Tensor], x: Tensor, *args: Any, out: str) -> list[Tensor]:
    """`values_and_codes` of an op's reference, whose dtype is x's."""
    return values_and_codes(ref(x if out == "same" else x.to(full_dtype(x)), *args), x.dtype, out)


def fake_outputs(
    x: Tensor, out: str, width: int | None = None, into: Tensor | None = None
) -> list[Tensor]:
    """Fake tensors for what `values_and_codes` gives, of x's shape but for the number of columns,
    where `width` gives that.
    """
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    parts = [] if out in FORMATS or into is not None else [x.new_empty(shape)]
    if out != "same":
        dtype, _ = FORMATS[out.removeprefix("both-")]
        parts += [x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=torch.float32)]
    return parts


def row_output(parts: Sequence[Tensor], out: str, into: Tensor | None = None) -> RowOutput:
    """Names the tensors that `values_and_codes` gives."""
    values, codes = (list(parts), []) if out == "same" else (list(parts[:-2]), list(parts[-2:]))
    if into is not None:
        values.append(into)
    q, q_scale = codes or (None, None)
    return RowOutput(values[0] if values else None, q, q_scale)


def autograd_outputs(ctx: Any, output: RowOutput) -> tuple[Tensor, ...]:
    """What an autograd.Function's forward returns: the tensors there are, codes and scales marked
    as without a gradient.
    """
    if output.q is not None:
        ctx.mark_non_differentiable(output.q, output.q_scale)
    ctx.set_materialize_grads(False)
    return tuple(part for part in output if part is not None)


def public_output(parts: Sequence[Tensor], out: str) -> Tensor | RowOutput:
    """What the public op returns: the values themselves where they are all that was asked for."""
    return parts[0] if out == "same" else row_output(parts, out)
