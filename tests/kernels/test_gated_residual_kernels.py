"""`gated_residual`: values, codes and every gradient beside fp64."""

import pytest
import torch
from kernel_cases import DTYPES, quantize_rows, randn, widen

from fluxfast_kernels.gated_residual import gated_residual_bwd, gated_residual_fwd
from support import bound, code_distance, relative_error

# batch, tokens, width; 35 rows end inside a program that sums 16
SIZES = [(1, 1, 96), (2, 35, 64), (2, 3, 1000), (1, 4, 17), (2, 0, 32)]


def inputs(batch, tokens, width, dtype):
    """x and y as slices of columns, the gate as a chunk of a longer vector, in `dtype`."""
    x, y = (widen(randn(batch, tokens, width, seed=seed).to(dtype)) for seed in (1, 2))
    return x, randn(batch, 3 * width, seed=3).to(dtype)[:, width : 2 * width], y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)
def test_forward_and_backward(dtype, batch, tokens, width):
    x, gate, y = inputs(batch, tokens, width, dtype)
    dout = widen(randn(batch, tokens, width, seed=4).to(dtype))
    exact = [t.double().requires_grad_() for t in (gate, y)]
    expected = x.double() + exact[0][:, None] * exact[1]
    dgate, dy = torch.autograd.grad(expected, exact, dout.double())
    out = gated_residual_fwd(x, gate, y)
    assert (
        out.dtype == dtype and out.is_contiguous() and relative_error(out, expected) < bound(dtype)
    )
    plain, full = gated_residual_bwd(dout, gate), gated_residual_bwd(dout, gate, y)
    assert plain.dgate is None and plain.dy_q is None and torch.equal(plain.dy, full.dy)
    assert plain.dy.dtype == dtype and relative_error(plain.dy, dy) < bound(dtype)
    assert full.dgate.dtype == dtype and relative_error(full.dgate, dgate) < bound(dtype)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("col_scaled", [False, True])
@pytest.mark.parametrize("with_y", [False, True])
def test_codes_of_the_gradient(fmt, col_scaled, with_y):
    _, gate, y = inputs(2, 18, 96, torch.float32)
    dout = randn(2, 18, 96, seed=4).float()
    dout[0, 1], dout[1, 17, 95] = 0, 1e5
    col_scale = randn(96, seed=5).float() if col_scaled else None
    call = (dout, gate, y if with_y else None)
    both = gated_residual_bwd(*call, out=f"both-{fmt}", col_scale=col_scale)
    only = gated_residual_bwd(*call, out=fmt, col_scale=col_scale)
    assert torch.equal(both.dy, dout * gate[:, None]) and only.dy is None
    q, q_scale = quantize_rows(both.dy * col_scale if col_scaled else both.dy, fmt)
    assert q_scale[0, 1] == 1
    for grads in (both, only):
        assert torch.equal(grads.dy_q_scale, q_scale) and code_distance(grads.dy_q, q) == 0
        assert (grads.dgate is None) == (not with_y)


def test_refusals():
    x, gate, y = inputs(1, 4, 64, torch.float32)
    with pytest.raises(ValueError, match=r"y \[1, 64, 4\] must have a contiguous last dimension"):
        gated_residual_fwd(x, gate, y.transpose(1, 2))
