"""`gelu`: values, codes and the gradient beside fp64, in slices and behind a copied prefix."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, quantize_rows, randn, widen

from fluxfast_kernels.gelu import gelu_bwd, gelu_fwd
from support import bound, code_distance, relative_error

# batch, tokens, columns: 5000 needs three programs a row where nothing is quantised
SIZES = [(1, 1, 96), (2, 5, 63), (1, 3, 5000), (2, 0, 16)]


def reference(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "cols"), SIZES)
def test_forward_and_backward(dtype, batch, tokens, cols):
    x, dy = (widen((3 * randn(batch, tokens, cols, seed=seed)).to(dtype)) for seed in (1, 2))
    exact = x.double().requires_grad_()
    expected = reference(exact)
    (dx,) = torch.autograd.grad(expected, exact, dy.double())
    y, q, q_scale = gelu_fwd(x)
    assert y.dtype == dtype and y.is_contiguous() and q is None and q_scale is None
    assert relative_error(y, expected) < bound(dtype)
    assert relative_error(gelu_bwd(dy, x).y, dx) < bound(dtype)


def test_tails():
    x = torch.tensor(
        [[[-1e4, -30, -12, -6, -1e-6, 0, 1e-6, 6, 30, 1e4, float("nan")]]], device=DEVICE
    )
    exact = x.double().requires_grad_()
    expected = reference(exact)
    (dx,) = torch.autograd.grad(expected.sum(), exact)
    # far out, exp magnifies what fp32 rounds off its argument, and there the value is next to
    # nothing
    torch.testing.assert_close(
        gelu_fwd(x).y.double(), expected, rtol=1e-4, atol=1e-9, equal_nan=True
    )
    torch.testing.assert_close(
        gelu_bwd(torch.ones_like(x), x).y.double(), dx, rtol=1e-4, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_in_a_slice_of_a_wider_buffer(dtype):
    x, dy = (randn(2, 3, 48, seed=seed).to(dtype) for seed in (1, 2))
    wide = torch.full((2, 3, 80), 7.0, dtype=dtype, device=x.device)
    dx = wide[..., 16:64]
    assert gelu_bwd(dy, x, dx=dx).y is dx and torch.equal(dx, gelu_bwd(dy, x).y)
    assert (wide[..., :16] == 7).all() and (wide[..., 64:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [72, 2100])
def test_prefix_is_copied(dtype, cols):
    x, prefix = widen(randn(2, 3, cols, seed=1).to(dtype)), widen(randn(2, 3, 24, seed=2).to(dtype))
    y = gelu_fwd(x, prefix=prefix).y
    assert y.shape == (2, 3, 24 + cols)
    assert torch.equal(y[..., :24], prefix) and torch.equal(y[..., 24:], gelu_fwd(x).y)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_codes(fmt, prefixed):
    x, prefix = (
        randn(2, 4, 72, seed=1).float(),
        randn(2, 4, 24, seed=2).float() if prefixed else None,
    )
    x[0, 1], x[1, 2, 70], x[0, 3] = 0, 3e4, -1e3
    if prefixed:
        prefix[0, 1], prefix[0, 3] = 0, 50
    both, only = gelu_fwd(x, out=f"both-{fmt}", prefix=prefix), gelu_fwd(x, out=fmt, prefix=prefix)
    q, q_scale = quantize_rows(both.y, fmt)
    assert only.y is None and q_scale[0, 1] == 1
    for out in (both, only):
        assert torch.equal(out.q_scale, q_scale) and code_distance(out.q, q) == 0


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("col_scaled", [False, True])
def test_codes_of_the_gradient(fmt, col_scaled):
    x, dy = randn(2, 4, 72, seed=1).float(), randn(2, 4, 72, seed=2).float()
    dy[0, 1], dy[1, 2, 71] = 0, 1e5
    col_scale = randn(72, seed=3).float() if col_scaled else None
    both, only = (
        gelu_bwd(dy, x, out=f"both-{fmt}", col_scale=col_scale),
        gelu_bwd(dy, x, out=fmt, col_scale=col_scale),
    )
    q, q_scale = quantize_rows(both.y * col_scale if col_scaled else both.y, fmt)
    assert only.y is None and torch.equal(both.y, gelu_bwd(dy, x).y) and q_scale[0, 1] == 1
    for out in (both, only):
        assert torch.equal(out.q_scale, q_scale) and code_distance(out.q, q) == 0


def test_refusals():
    x = randn(1, 4, 6, seed=1)
    with pytest.raises(ValueError, match="int7"):
        gelu_fwd(x, out="int7")
    with pytest.raises(ValueError, match=r"dy .* must have a contiguous"):
        gelu_bwd(x.transpose(1, 2), x.transpose(1, 2).contiguous())
