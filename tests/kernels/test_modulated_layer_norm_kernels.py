"""`modulated_layer_norm` beside fp64: values, codes and every gradient, with and without a gate."""

import pytest
import torch
from kernel_cases import DTYPES, quantize_rows, randn, widen

from fluxfast_kernels.modulated_layer_norm import (
    modulated_layer_norm_bwd,
    modulated_layer_norm_fwd,
)
from support import assert_same, bound, code_distance, relative_error

# batch, tokens, width: FLUX.1's width is no power of two either; 33 rows end inside a program that
# sums 16
SIZES = [(1, 1, 96), (2, 33, 64), (2, 3, 1000), (1, 20, 17)]


def reference(x, scale, shift, eps):
    return (
        torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None])
        + shift[:, None]
    )


def inputs(batch, tokens, width, dtype):
    """x as a slice of columns, and shift, scale and gate as chunks of one vector a sample."""
    x = widen((randn(batch, tokens, width, seed=1) * 3 + 1).to(dtype))
    return x, *(0.3 * randn(batch, 3 * width, seed=2)).to(dtype).chunk(3, dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)
def test_forward(dtype, batch, tokens, width):
    x, shift, scale, _ = inputs(batch, tokens, width, dtype)
    out = modulated_layer_norm_fwd(x, scale, shift, 1e-6)
    exact = x.double()
    assert out.y.dtype == dtype and out.y.is_contiguous() and out.q is None and out.q_scale is None
    assert relative_error(out.y, reference(exact, scale.double(), shift.double(), 1e-6)) < bound(
        dtype
    )
    assert relative_error(out.mean, exact.mean(-1)) < bound(torch.float32)
    rstd = (exact.var(-1, unbiased=False) + 1e-6).rsqrt()
    assert relative_error(out.rstd, rstd) < bound(torch.float32)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 5, 96), (1, 3, 17)])
def test_codes(fmt, batch, tokens, width):
    x, shift, scale, _ = inputs(batch, tokens, width, torch.float32)
    x[:, 1], x[:, 2, 3] = 0, 1e4
    scale[0], shift[0] = -1, 0
    both = modulated_layer_norm_fwd(x, scale, shift, 1e-6, out=f"both-{fmt}")
    only = modulated_layer_norm_fwd(x, scale, shift, 1e-6, out=fmt)
    q, q_scale = quantize_rows(both.y, fmt)
    assert torch.equal(both.q_scale, q_scale) and code_distance(both.q, q) == 0
    assert only.y is None
    assert_same(only.q_scale, q_scale)
    assert_same(only.q, q)
    # the modulation of the first sample is zero: nothing is left of it but codes 0 with scale 1
    assert (q_scale[0] == 1).all() and not both.q[0].float().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_come_from_values_that_were_not_rounded(dtype):
    x, shift, scale, _ = inputs(1, 9, 96, dtype)
    out = modulated_layer_norm_fwd(x, scale, shift, 1e-6, out="both-int8")
    exact = reference(x.double(), scale.double(), shift.double(), 1e-6)
    # half a code, and fp32 on the way there
    assert (
        (out.q.double() * out.q_scale[..., None] - exact).abs() <= 0.5001 * out.q_scale[..., None]
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)
@pytest.mark.parametrize("with_add", [False, True])
def test_backward(dtype, batch, tokens, width, with_add):
    x, shift, scale, _ = inputs(batch, tokens, width, dtype)
    dy, add_to = (widen(randn(batch, tokens, width, seed=seed).to(dtype)) for seed in (3, 4))
    exact = [t.double().requires_grad_() for t in (x, scale, shift)]
    dx, dscale, dshift = torch.autograd.grad(reference(*exact, 1e-6), exact, dy.double())
    _, _, _, mean, rstd, _ = modulated_layer_norm_fwd(x, scale, shift, 1e-6)
    add = add_to if with_add else None
    plain = modulated_layer_norm_bwd(dy, x, scale, mean, rstd, add_to=add)
    full = modulated_layer_norm_bwd(dy, x, scale, mean, rstd, add_to=add, modulation=True)
    expected = dx + add_to.double() if with_add else dx
    assert plain.dscale is None and plain.dshift is None and plain.dbranch is None
    for grads in (plain, full):
        assert grads.dx.dtype == dtype and relative_error(grads.dx, expected) < bound(dtype)
    assert full.dscale.dtype == dtype and relative_error(full.dscale, dscale) < bound(dtype)
    assert relative_error(full.dshift, dshift) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 96), (2, 33, 64), (1, 5, 1000)])
def test_gated_residual_in_front(dtype, batch, tokens, width):
    residual, shift, scale, gate = inputs(batch, tokens, width, dtype)
    branch = widen(randn(batch, tokens, width, seed=5).to(dtype))
    exact = [t.double().requires_grad_() for t in (residual, gate, branch, scale, shift)]
    out = modulated_layer_norm_fwd(residual, scale, shift, 1e-6, gate=gate, branch=branch)
    x = out.x
    total = torch.addcmul(exact[0], exact[1][:, None], exact[2])
    y = reference(total, *exact[3:], 1e-6)
    # y is made of the rounded x, as it is where the two ops run one after the other: x's rounding
    # counts twice
    assert relative_error(x, total) < bound(dtype) and relative_error(out.y, y) < 2 * bound(dtype)

    dy, add_to = (randn(batch, tokens, width, seed=seed).to(dtype) for seed in (6, 7))
    expected = torch.autograd.grad((y, total), exact, (dy.double(), add_to.double()))
    grads = modulated_layer_norm_bwd(
        dy, x, scale, out.mean, out.rstd, add_to=add_to, modulation=True, gate=gate, branch=branch
    )
    actual = (grads.dx, grads.dgate, grads.dbranch, grads.dscale, grads.dshift)
    for name, grad, reference_grad in zip(
        ("dx", "dgate", "dbranch", "dscale", "dshift"), actual, expected, strict=True
    ):
        assert grad.dtype == dtype and relative_error(grad, reference_grad) < 2 * bound(dtype), name


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_codes_of_the_branch_gradient(fmt):
    x, _, scale, gate = inputs(2, 5, 96, torch.float32)
    dy, add_to, col_scale = (
        randn(2, 5, 96, seed=6).float(),
        randn(2, 5, 96, seed=7).float(),
        randn(96, seed=8).float(),
    )
    dy[0, 1] = add_to[0, 1] = 0
    mean, rstd = x.mean(-1), x.var(-1, unbiased=False).rsqrt()
    call = {"add_to": add_to, "gate": gate, "col_scale": col_scale}
    both = modulated_layer_norm_bwd(dy, x, scale, mean, rstd, out=f"both-{fmt}", **call)
    only = modulated_layer_norm_bwd(dy, x, scale, mean, rstd, out=fmt, **call)
    assert torch.equal(both.dbranch, both.dx * gate[:, None]) and only.dbranch is None
    q, q_scale = quantize_rows(both.dbranch * col_scale, fmt)
    assert torch.equal(both.dbranch_q_scale, q_scale) and code_distance(both.dbranch_q, q) == 0
    assert_same(only.dbranch_q_scale, q_scale)
    assert_same(only.dbranch_q, q)
    assert q_scale[0, 1] == 1 and not q[0, 1].float().any()


def test_nan_and_infinity_show_in_their_row_alone():
    x, shift, scale, _ = inputs(1, 4, 64, torch.float32)
    x[0, 1, 5], x[0, 2, 63] = float("nan"), float("inf")
    out = modulated_layer_norm_fwd(x, scale, shift, 1e-6, out="both-int8")
    for row in (1, 2):
        assert out.y[0, row].isnan().all() and out.q_scale[0, row].isnan()
    assert out.y[0, ::3].isfinite().all() and out.q_scale[0, ::3].isfinite().all()


def test_no_tokens():
    x, shift, scale, _ = inputs(2, 0, 32, torch.float32)
    out = modulated_layer_norm_fwd(x, scale, shift, out="both-int8")
    grads = modulated_layer_norm_bwd(x, x, scale, out.mean, out.rstd, modulation=True)
    assert out.y.shape == out.q.shape == grads.dx.shape == (
        2,
        0,
        32,
    ) and out.mean.shape == out.q_scale.shape == (2, 0)
    assert not grads.dscale.any() and not grads.dshift.any()


def test_refusals():
    x, shift, scale, _ = inputs(1, 4, 64, torch.float32)
    with pytest.raises(ValueError, match="fp8"):
        modulated_layer_norm_fwd(x, scale, shift, out="fp8")
    with pytest.raises(ValueError, match=r"x \[1, 64, 4\] must have a contiguous last dimension"):
        modulated_layer_norm_fwd(x.transpose(1, 2), scale, shift)
