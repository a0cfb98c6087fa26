"""LayerNorm without an affine part, then a per-sample modulation: y = LayerNorm(x)·(1 + scale) +
shift.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, gated_residual, registration, row_quant
from fluxfast.ops.row_quant import CodesOut, RowOutput
from fluxfast.ops.tensors import contiguous_like, dense_rows, full_dtype


def modulated_layer_norm_ref(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The maths in plain, differentiable torch: x [B, S, D], scale and shift [B, D] → [B, S, D].

    Computes in fp32 (fp64 if x is) and rounds once, to x's dtype.
    """
    dtype = full_dtype(x)
    xhat = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None].to(dtype), xhat, 1 + scale[:, None].to(dtype)).to(x.dtype)


def modulated_layer_norm_fwd(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: str, impl: str
) -> list[Tensor]:
    """Each row's mean and reciprocal standard deviation [B, S], then what `out` asks for of y [B,
    S, D], codes and scales.

    The launcher alone: no autograd.
    """
    x, scale, shift = dense_rows(x), dense_rows(scale), dense_rows(shift)
    if impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        y, q, q_scale, mean, rstd = kernels.modulated_layer_norm_fwd(x, scale, shift, eps, out=out)
        return [mean, rstd, *(part for part in (y, q, q_scale) if part is not None)]
    y = contiguous_like(x)
    stats = x.new_empty(2, *x.shape[:2])
    dispatch.native.modulated_layer_norm_fwd(
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        shift.data_ptr(), shift.stride(0),
        y.data_ptr(), stats.data_ptr(), *x.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    return [*stats.unbind(), *row_quant.values_and_codes(y, y.dtype, out, impl=impl)]


def modulated_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    add_to: Tensor | None,
    modulation: bool,
    impl: str,
) -> list[Tensor]:
    """dx [B, S, D], to which add_to [B, S, D] is added; with `modulation` dscale and dshift [B, D]
    too.
    """
    dy, x, scale = dense_rows(dy), dense_rows(x), dense_rows(scale)
    if impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        add_to = None if add_to is None else dense_rows(add_to)
        grads = kernels.modulated_layer_norm_bwd(
            dy, x, scale, mean, rstd, add_to=add_to, modulation=modulation
        )
        return [grad for grad in grads[:3] if grad is not None]
    dx = contiguous_like(x)
    dmodulation = x.new_empty(2, *scale.shape) if modulation else x.new_empty(0)
    stats = torch.stack((mean, rstd))
    dispatch.native.modulated_layer_norm_bwd(
        dy.data_ptr(), *dy.stride()[:2],
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        stats.data_ptr(), dx.data_ptr(), dmodulation.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    if add_to is not None:
        dx += add_to
    return [dx, *dmodulation] if modulation else [dx]


def gated_residual_layer_norm_fwd(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out: str,
    impl: str,
) -> list[Tensor]:
    """x = residual + gate·branch [B, S, D], then what `modulated_layer_norm_fwd` makes of it; the
    launcher alone.
    """
    if impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        residual, gate, branch, scale, shift = (
            dense_rows(t) for t in (residual, gate, branch, scale, shift)
        )
        x, (y, q, q_scale, mean, rstd) = kernels.gated_residual_layer_norm_fwd(
            residual, gate, branch, scale, shift, eps, out=out
        )
        return [x, mean, rstd, *(part for part in (y, q, q_scale) if part is not None)]
    x = torch.addcmul(residual, gate[:, None], branch)
    return [x, *modulated_layer_norm_fwd(x, scale, shift, eps, out, impl)]


def gated_residual_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    gate: Tensor,
    branch: Tensor | None,
    add_to: Tensor | None,
    modulation: bool,
    out: str,
    col_scale: Tensor | None,
    impl: str,
) -> list[Tensor]:
    """dx [B, S, D]; with `modulation` dscale, dshift and, given the branch, dgate [B, D]; what
    `out` asks for of dbranch.
    """
    if impl == "triton":
        from fluxfast_kernels import modulated_layer_norm as kernels

        dy, x, scale, gate = (dense_rows(t) for t in (dy, x, scale, gate))
        add_to, branch = (None if t is None else dense_rows(t) for t in (add_to, branch))
        grads = kernels.modulated_layer_norm_bwd(
            dy, x, scale, mean, rstd, add_to=add_to, modulation=modulation, gate=gate,
            branch=branch if modulation else None, out=out, col_scale=col_scale,
        )  # fmt: skip
        return [grad for grad in grads if grad is not None]
    dx, *sums = modulated_layer_norm_bwd(dy, x, mean, rstd, scale, add_to, modulation, impl)
    branch = branch if modulation else None
    return [dx, *sums, *gated_residual.gated_residual_bwd(dx, gate, branch, out, col_scale, impl)]


def _bwd_ref(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    add_to: Tensor | None,
    modulation: bool,
) -> list[Tensor]:
    dtype = full_dtype(x)
    dy = dy.to(dtype)
    xhat = (x.to(dtype) - mean[..., None]) * rstd[..., None]
    g = dy * (1 + scale[:, None].to(dtype))
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None]
    if add_to is not None:
        dx = dx + add_to
    sums = [(dy * xhat).sum(1).to(scale.dtype), dy.sum(1).to(scale.dtype)] if modulation else []
    return [dx.to(x.dtype), *sums]


_fwd_op = registration.register(modulated_layer_norm_fwd)
_bwd_op = registration.register(modulated_layer_norm_bwd)


@_fwd_op.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: str, impl: str) -> list[Tensor]:
    stats = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)]
    return [*stats, *row_quant.fake_outputs(x, out)]


@_bwd_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    add_to: Tensor | None,
    modulation: bool,
    impl: str,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape),
        *(scale.new_empty(scale.shape) for _ in range(2 if modulation else 0)),
    ]


_residual_fwd_op = registration.register(gated_residual_layer_norm_fwd)
_residual_bwd_op = registration.register(gated_residual_layer_norm_bwd)


@_residual_fwd_op.register_fake
def _(residual: Tensor, *rest: Any) -> list[Tensor]:
    *_, out, _ = rest
    stats = [residual.new_empty(residual.shape[:2], dtype=torch.float32) for _ in range(2)]
    return [residual.new_empty(residual.shape), *stats, *row_quant.fake_outputs(residual, out)]


@_residual_bwd_op.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, *rest: Any) -> list[Tensor]:
    gate, branch, _, modulation, out, _, _ = rest
    sums = [scale, scale, *([] if branch is None else [gate])] if modulation else []
    return [
        x.new_empty(x.shape),
        *(t.new_empty(t.shape) for t in sums),
        *row_quant.fake_outputs(x, out),
    ]


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, out: str = "same", impl: str
) -> tuple[RowOutput, tuple[Tensor, ...]]:
    """Raw interface: what `out` asks for, and (x, mean, rstd, scale) to keep for backward."""
    if impl == "ref":
        var, mean = torch.var_mean(x.to(full_dtype(x)), -1, correction=0)
        rstd, parts = (
            torch.rsqrt(var + eps),
            row_quant.ref_outputs(modulated_layer_norm_ref, x, scale, shift, eps, out=out),
        )
    else:
        launch = registration.launcher(x, modulated_layer_norm_fwd, _fwd_op)
        mean, rstd, *parts = launch(x, scale, shift, eps, out, impl)
    return row_quant.row_output(parts, out), (x, mean, rstd, scale)


def backward(
    dy: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    *,
    add_to: Tensor | None = None,
    impl: str,
) -> tuple[Tensor | None, ...]:
    """Raw interface: (dx, dscale, dshift). add_to [B, S, D], the gradient that reaches x past the
    norm, is added to dx.
    """
    needs_scale, needs_shift = needs[1:]
    arguments: tuple[Any, ...] = (dy, *saved, add_to, needs_scale or needs_shift)
    if impl == "ref":
        dx, *sums = _bwd_ref(*arguments)
    else:
        dx, *sums = registration.launcher(dy, modulated_layer_norm_bwd, _bwd_op)(*arguments, impl)
    return (
        dx if needs[0] else None,
        sums[0] if needs_scale else None,
        sums[1] if needs_shift else None,
    )


def forward_residual(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    out: str = "same",
    keep_branch: bool = False,
    impl: str,
) -> tuple[Tensor, RowOutput, tuple[Tensor | None, ...]]:
    """Raw interface: x = residual + gate·branch, what `out` asks for of its modulated LayerNorm,
    and what backward keeps.

    residual, branch [B, S, D]; gate, scale, shift [B, D]. Kept: (x, mean, rstd, scale, gate,
    branch), the branch only if `keep_branch`, and without it there is no dgate. The first four are
    what `forward` of x would keep.
    """
    if impl == "ref":
        x = gated_residual.gated_residual_ref(residual, gate, branch)
        output, kept = forward(x, scale, shift, eps, out=out, impl=impl)
    else:
        launch = registration.launcher(residual, gated_residual_layer_norm_fwd, _residual_fwd_op)
        x, mean, rstd, *parts = launch(residual, gate, branch, scale, shift, eps, out, impl)
        output, kept = row_quant.row_output(parts, out), (x, mean, rstd, scale)
    return x, output, (*kept, gate, branch if keep_branch else None)


def backward_residual(
    dy: Tensor,
    saved: Sequence[Tensor | None],
    *,
    add_to: Tensor | None = None,
    out: str = "same",
    col_scale: Tensor | None = None,
    modulation: bool = False,
    impl: str,
) -> tuple[Tensor, RowOutput, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Raw interface: dx, which is the residual's gradient too; dbranch = gate·dx as `out` says;
    (dscale, dshift, dgate).

    dy [B, S, D]: the gradient of the norm's values. add_to [B, S, D], the gradient that reaches x
    past the norm, is added to dx. The codes are those of dbranch·col_scale, col_scale [D]. The last
    three are None without `modulation`, dgate without a branch kept as well.
    """
    x, mean, rstd, scale, gate, branch = saved
    assert (
        x is not None
        and mean is not None
        and rstd is not None
        and scale is not None
        and gate is not None
    )
    if impl == "ref":
        dx, *sums = _bwd_ref(dy, x, mean, rstd, scale, add_to, modulation)
        options: dict[str, Any] = {"needs_gate": modulation and branch is not None, "impl": impl}
        dbranch, dgate = gated_residual.backward_rows(
            dx, (gate, branch), out=out, col_scale=col_scale, **options
        )
        return dx, dbranch, (sums[0], sums[1], dgate) if modulation else (None, None, None)
    launch = registration.launcher(dy, gated_residual_layer_norm_bwd, _residual_bwd_op)
    dx, *rest = launch(
        dy, x, mean, rstd, scale, gate, branch, add_to, modulation, out, col_scale, impl
    )
    count = 0 if not modulation else 2 if branch is None else 3
    dscale, dshift, dgate = (*rest[:count], None, None, None)[:3]
    return dx, row_quant.row_output(rest[count:], out), (dscale, dshift, dgate)


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
        return (
            *backward(dy, ctx.saved_tensors, ctx.needs_input_grad[:3], impl=ctx.impl),
            None,
            None,
            None,
        )


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
        return row_quant.public_output(
            row_quant.ref_outputs(modulated_layer_norm_ref, x, scale, shift, eps, out=out), out
        )
    return row_quant.public_output(
        _ModulatedLayerNorm.apply(x, scale, shift, eps, out, backend), out
    )
