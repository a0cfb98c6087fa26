"""LayerNorm without an affine part, then a per-sample modulation.

y = LayerNorm(x)·(1 + scale) + shift
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, gated_residual, row_quant
from fluxfast.ops.parts import (
    FormOfOperand,
    Parts,
    PerPart,
    dense_vectors,
    in_form_of,
    only,
    tensors_of,
)
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import CodesOut, RowOutput
from fluxfast.ops.tensors import contiguous_like, dense_rows, full_dtype


def modulated_layer_norm_ref(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The maths in plain, differentiable torch: x [B, S, D], scale and shift [B, D] → [B, S, D].

    Computes in fp32 (fp64 if x is) and rounds once, to x's dtype.
    """
    dtype = full_dtype(x)
    xhat = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None].to(dtype), xhat, 1 + scale[:, None].to(dtype)).to(x.dtype)


def forward(
    x: Tensor,
    scale: PerPart,
    shift: PerPart,
    eps: float = 1e-6,
    *,
    out: str = "same",
    into: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> tuple[RowOutput, tuple[Tensor, Tensor, Tensor, PerPart]]:
    """Raw interface: what `out` asks for, and (x, mean, rstd, scale) to keep for backward.

    mean and rstd [B, S] are each row's mean and reciprocal standard deviation. The values are
    written to `into`, where it is given and `out` asks for values. parts: see `ops.parts`; x is
    [R, D] then, and scale and shift are pairs.
    """
    assert into is None or out not in row_quant.FORMATS
    if impl == "ref":
        output, mean, rstd = _forward_ref(x, only(scale), only(shift), eps, out, into)
    elif is_traced(x):
        made = iter(_forward_op(x, scale, shift, eps, out=out, into=into, parts=parts, impl=impl))
        output, mean, rstd = row_quant.from_parts(made, out, into), next(made), next(made)
    elif impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        *rows, mean, rstd, _ = kernels.modulated_layer_norm_fwd(
            dense_rows(x), dense_vectors(scale), dense_vectors(shift), eps,
            out=out, y=into, parts=parts,
        )  # fmt: skip
        output = RowOutput(*rows)
    else:
        output, mean, rstd = _forward_native(x, only(scale), only(shift), eps, out, into)
    return output, (x, mean, rstd, scale)


def backward(
    dy: Tensor,
    saved: Sequence[PerPart],
    needs: Sequence[bool],
    *,
    add_to: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> tuple[Tensor | None, FormOfOperand, FormOfOperand]:
    """Raw interface: (dx, dscale, dshift), None where `needs` says so.

    add_to [B, S, D], the gradient that reaches x past the norm, is added to dx. parts: see
    `ops.parts`; dy and add_to are [R, D] then, and dscale and dshift are pairs.
    """
    x, mean, rstd, scale = saved
    x, mean, rstd = only(x), only(mean), only(rstd)
    modulation = needs[1] or needs[2]
    grads: Sequence[Any]
    if impl == "ref":
        grads = _backward_ref(dy, x, mean, rstd, only(scale), add_to, modulation)
    elif is_traced(dy):
        made = iter(_backward_op(dy, saved, needs, add_to=add_to, parts=parts, impl=impl))
        forms = zip((x, scale, scale), needs, strict=True)
        grads = [in_form_of(form, made) if need else None for form, need in forms]
    elif impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        add_to = None if add_to is None else dense_rows(add_to)
        grads = kernels.modulated_layer_norm_bwd(
            dense_rows(dy), dense_rows(x), dense_vectors(scale), mean, rstd,
            add_to=add_to, modulation=modulation, parts=parts,
        )  # fmt: skip
    else:
        grads = _backward_native(dy, x, mean, rstd, only(scale), add_to, modulation)
    dx, dscale, dshift = (grad if need else None for grad, need in zip(grads, needs, strict=False))
    return dx, dscale, dshift


def forward_residual(
    residual: Tensor,
    gate: PerPart,
    branch: Tensor,
    scale: PerPart,
    shift: PerPart,
    eps: float = 1e-6,
    *,
    out: str = "same",
    keep_branch: bool = False,
    into: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> tuple[Tensor, RowOutput, tuple[PerPart | None, ...]]:
    """Raw interface of a gated residual and the norm of its sum, in one pass.

    residual, branch [B, S, D]; gate, scale, shift [B, D]. Returns x = residual + gate·branch, what
    `out` asks for of its modulated LayerNorm, and what backward keeps: (x, mean, rstd, scale, gate,
    branch). The first four are what `forward` of x would keep; the branch is kept only if
    `keep_branch`, and without it there is no dgate. into, parts: as `forward` takes them; gate is a
    pair with `parts`.
    """
    assert into is None or out not in row_quant.FORMATS
    kept: tuple[PerPart, ...]
    if impl == "triton" and not is_traced(residual):
        from fluxfast_kernels import modulated_layer_norm as kernels

        *rows, mean, rstd, x = kernels.modulated_layer_norm_fwd(
            dense_rows(residual), dense_vectors(scale), dense_vectors(shift), eps,
            gate=dense_vectors(gate), branch=dense_rows(branch), out=out, y=into, parts=parts,
        )  # fmt: skip
        assert x is not None
        output, kept = RowOutput(*rows), (x, mean, rstd, scale)
    elif impl == "triton":
        inputs = (residual, gate, branch, scale, shift, eps)
        options: dict[str, Any] = {"out": out, "keep_branch": keep_branch, "into": into}
        x, *rest = _forward_residual_op(*inputs, **options, parts=parts, impl=impl)
        made = iter(rest)
        output = row_quant.from_parts(made, out, into)
        kept = (x, next(made), next(made), scale)
    else:
        x = gated_residual.gated_residual_ref(residual, only(gate), branch)
        output, kept = forward(x, scale, shift, eps, out=out, into=into, impl=impl)
    return x, output, (*kept, gate, branch if keep_branch else None)


def backward_residual(
    dy: Tensor,
    saved: Sequence[PerPart | None],
    *,
    add_to: Tensor | None = None,
    out: str = "same",
    col_scale: PerPart | None = None,
    modulation: bool = False,
    into: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> tuple[Tensor, RowOutput, tuple[FormOfOperand, FormOfOperand, FormOfOperand]]:
    """Raw interface: dx, which is the residual's gradient too; dbranch; (dscale, dshift, dgate).

    dy [B, S, D]: the gradient of the norm's values. add_to [B, S, D], the gradient that reaches x
    past the norm, is added to dx. dbranch = gate·dx comes as `out` says; its values are written to
    `into`, where it is given and `out` asks for values, and its codes are those of
    dbranch·col_scale, col_scale [D]. The last three are None without `modulation`, and dgate is
    None without a branch that was kept. parts: see `ops.parts`; tensors of rows are [R, D] then,
    and col_scale and the last three are pairs.
    """
    *norm, gate, branch = saved
    x, mean, rstd = (only(kept) for kept in norm[:3])
    scale = norm[3]
    assert x is not None and mean is not None and rstd is not None
    assert gate is not None and scale is not None
    assert into is None or out not in row_quant.FORMATS
    branch = only(branch) if modulation else None
    options: dict[str, Any] = {"out": out, "col_scale": col_scale, "into": into, "impl": impl}
    if impl == "triton" and not is_traced(dy):
        from fluxfast_kernels import modulated_layer_norm as kernels

        add_to, branch = (None if t is None else dense_rows(t) for t in (add_to, branch))
        grads = kernels.modulated_layer_norm_bwd(
            dense_rows(dy), dense_rows(x), dense_vectors(scale), mean, rstd,
            add_to=add_to, modulation=modulation, gate=dense_vectors(gate), branch=branch,
            out=out, col_scale=dense_vectors(col_scale), dbranch=into, parts=parts,
        )  # fmt: skip
        return grads.dx, RowOutput(*grads[4:]), grads[1:4]
    if impl == "triton":
        options |= {"add_to": add_to, "modulation": modulation, "parts": parts}
        dx, *rest = _backward_residual_op(dy, saved, **options)
        made = iter(rest)
        rows = row_quant.from_parts(made, out, into)
        forms = [scale, scale, *([] if branch is None else [gate])] if modulation else []
        sums = [in_form_of(form, made) for form in forms]
        dscale, dshift, dgate = (*sums, None, None, None)[:3]
        return dx, rows, (dscale, dshift, dgate)
    needs = (True, modulation, modulation)
    total, dscale, dshift = backward(dy, (x, mean, rstd, scale), needs, add_to=add_to, impl=impl)
    assert total is not None
    dbranch, dgate = gated_residual.backward_rows(
        total, (gate, branch), needs_gate=branch is not None, **options
    )
    return total, dbranch, (dscale, dshift, dgate)


def _forward_ref(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: str, into: Tensor | None
) -> tuple[RowOutput, Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(full_dtype(x)), -1, correction=0)
    y = modulated_layer_norm_ref(x if out == "same" else x.to(full_dtype(x)), scale, shift, eps)
    return row_quant.output_of(y, x.dtype, out, into=into), mean, torch.rsqrt(var + eps)


def _forward_native(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: str, into: Tensor | None
) -> tuple[RowOutput, Tensor, Tensor]:
    x, scale, shift = dense_rows(x), dense_rows(scale), dense_rows(shift)
    y, stats = contiguous_like(x), x.new_empty(2, *x.shape[:2])
    dispatch.native.modulated_layer_norm_fwd(
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        shift.data_ptr(), shift.stride(0),
        y.data_ptr(), stats.data_ptr(), *x.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    mean, rstd = stats.unbind()
    return row_quant.output_of(y, y.dtype, out, into=into, impl="native"), mean, rstd


def _backward_native(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    add_to: Tensor | None,
    modulation: bool,
) -> tuple[Tensor | None, ...]:
    dy, x, scale = dense_rows(dy), dense_rows(x), dense_rows(scale)
    dx, stats = contiguous_like(x), torch.stack((mean, rstd))
    sums = x.new_empty(2, *scale.shape) if modulation else x.new_empty(0)
    dispatch.native.modulated_layer_norm_bwd(
        dy.data_ptr(), *dy.stride()[:2],
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        stats.data_ptr(), dx.data_ptr(), sums.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    if add_to is not None:
        dx += add_to
    return (dx, *sums) if modulation else (dx, None, None)


def _backward_ref(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    add_to: Tensor | None,
    modulation: bool,
) -> tuple[Tensor | None, ...]:
    dtype = full_dtype(x)
    dy = dy.to(dtype)
    xhat = (x.to(dtype) - mean[..., None]) * rstd[..., None]
    g = dy * (1 + scale[:, None].to(dtype))
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None]
    if add_to is not None:
        dx = dx + add_to
    if not modulation:
        return dx.to(x.dtype), None, None
    return dx.to(x.dtype), (dy * xhat).sum(1).to(scale.dtype), dy.sum(1).to(scale.dtype)


def _fake_stats(x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]


def _fake_forward(x: Tensor, out: str, into: Tensor | None, **_: Any) -> list[Tensor]:
    return [*row_quant.empty_parts(x, out, into=into), *_fake_stats(x)]


def _fake_backward(saved: Sequence[PerPart], needs: Sequence[bool], **_: Any) -> list[Tensor]:
    x, _mean, _rstd, scale = saved
    wanted = [own for own, need in zip((x, scale, scale), needs, strict=True) if need]
    return [t.new_empty(t.shape) for t in tensors_of(*wanted)]


def _fake_forward_residual(
    residual: Tensor, out: str, into: Tensor | None, **_: Any
) -> list[Tensor]:
    x = residual.new_empty(residual.shape)
    return [x, *row_quant.empty_parts(x, out, into=into), *_fake_stats(x)]


def _fake_backward_residual(
    saved: Sequence[PerPart], out: str, modulation: bool, into: Tensor | None, **_: Any
) -> list[Tensor]:
    x, _mean, _rstd, scale, gate, branch = saved
    sums = [scale, scale, *([] if branch is None else [gate])] if modulation else []
    rows = row_quant.empty_parts(only(x), out, into=into)
    return [*(t.new_empty(t.shape) for t in tensors_of(x)), *rows] + [
        t.new_empty(t.shape) for t in tensors_of(*sums)
    ]


_forward_op = Op("modulated_layer_norm_fwd", forward, _fake_forward, writes=["into"])
_backward_op = Op("modulated_layer_norm_bwd", backward, _fake_backward)
_forward_residual_op = Op(
    "gated_residual_layer_norm_fwd", forward_residual, _fake_forward_residual, writes=["into"]
)
_backward_residual_op = Op(
    "gated_residual_layer_norm_bwd", backward_residual, _fake_backward_residual, writes=["into"]
)


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: str, impl: str
    ) -> tuple[Tensor, ...]:
        output, saved = forward(x, scale, shift, eps, out=out, impl=impl)
        ctx.save_for_backward(*saved)
        ctx.impl = impl
        return row_quant.autograd_outputs(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        grads = backward(dy, ctx.saved_tensors, ctx.needs_input_grad[:3], impl=ctx.impl)
        return *grads, None, None, None


@overload
def modulated_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    impl: str = "auto",
    *,
    out: Literal["same"] = "same",
) -> Tensor: ...
@overload
def modulated_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, impl: str = "auto", *, out: CodesOut
) -> RowOutput: ...
def modulated_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    impl: str = "auto",
    *,
    out: str = "same",
) -> Tensor | RowOutput:
    """LayerNorm(x)·(1 + scale[:, None]) + shift[:, None].

    x [B, S, D]; scale, shift [B, D]. Returns [B, S, D]. Backward keeps x, scale, and each row's
    mean and reciprocal standard deviation; dscale and dshift are computed only where asked for.
    `out` asks for the values ("same"), for their row-quantised codes ("int8", "e4m3"), or for both
    ("both-int8", "both-e4m3"); but for "same", a RowOutput comes back. A gradient comes in through
    the values only. Raises ValueError on shapes that don't fit, on another `out`, or if `impl`
    can't do this call. Source: diffusers' `AdaLayerNormZero`.
    """
    row_quant.check_out("modulated_layer_norm", out)
    if x.ndim != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape:
        raise ValueError(
            "modulated_layer_norm: expected x [B, S, D] and scale and shift [B, D], "
            f"got x {list(x.shape)}, scale {list(scale.shape)}, shift {list(shift.shape)}"
        )
    backend = dispatch.resolve("modulated_layer_norm", impl, (x, scale, shift))
    if backend == "ref":
        output = row_quant.ref_output(modulated_layer_norm_ref, x, scale, shift, eps, out=out)
    else:
        parts = _ModulatedLayerNorm.apply(x, scale, shift, eps, out, backend)
        output = row_quant.from_parts(parts, out)
    return row_quant.public_output(output)
