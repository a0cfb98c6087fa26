"""The kernels of weight decomposition, beside the weight formed whole in fp64."""

import pytest
import torch

from fluxfast_kernels.row_scales import column_dots, row_scales
from support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32: sums of a few hundred terms; bf16 and fp16: B A from factors of that type, g B rounded
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def rand(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def wanted(w, a, b, magnitude, scale):
    whole = w.double() + scale * b.double() @ a.double()
    norms = torch.linalg.vector_norm(whole, dim=1)
    g = magnitude.double() / norms
    return norms, g, g[:, None] * b.double()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (63, 1000, 3), (40, 64, 70), (17, 130, 16)])
def test_float_weights(n, k, r, dtype):
    w, a, b, m = rand(n, k, dtype=dtype), rand(r, k, seed=1), rand(n, r, seed=2), rand(n, seed=3)
    norms = torch.full((n,), torch.nan, device=DEVICE)
    g, gb = row_scales(w, a, b, m, norms, scale=0.3, dtype=dtype)
    for made, expected in zip((norms, g, gb), wanted(w, a, b, m, 0.3), strict=True):
        assert relative_error(made, expected) < TOLERANCES[dtype]
    assert gb.dtype == dtype
    # where the norms are given, the same bits
    again = row_scales(None, a, b, m, norms, scale=0.3, dtype=dtype)
    assert torch.equal(again[0], g) and torch.equal(again[1], gb)


def test_rows_that_lie_apart_and_codes():
    n, k, r = 33, 70, 5
    q = torch.randint(-127, 128, (n, 2 * k), generator=torch.Generator().manual_seed(4))
    q, q_scale = q.to(DEVICE, torch.int8)[:, :k], rand(n, seed=5).abs() + 0.1
    a, b, m = rand(r, 2 * k, seed=1)[:, :k], rand(n, 9, seed=2)[:, :r], rand(n, seed=3)
    norms = torch.empty(n, device=DEVICE)
    made = row_scales(q, a, b, m, norms, scale=0.3, w_scale=q_scale, dtype=torch.float32)
    expected = wanted(q.double() * q_scale.double()[:, None], a, b, m, 0.3)
    for one, other in zip((norms, *made), expected, strict=True):
        assert relative_error(one, other) < 1e-6


def test_rows_of_zeros():
    """Their norm is taken to be tiny, and nothing is divided by zero."""
    w, a, b, m = torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(3, 2), torch.zeros(3)
    w, a, b, m = (t.to(DEVICE) for t in (w, a, b, m))
    g, gb = row_scales(w, a, b, m, torch.empty_like(m), scale=1.0, dtype=torch.float32)
    assert not g.any() and not gb.any()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("m", "n"), [(0, 5), (1, 1), (63, 1000), (1000, 63), (4000, 7)])
def test_column_dots(m, n, dtype):
    x, y = rand(m, n, dtype=dtype), rand(m, 2 * n, dtype=dtype, seed=1)[:, n:]
    dots = column_dots(x, y)
    expected = (x.double() * y.double()).sum(0)
    assert torch.equal(dots, column_dots(x, y))
    if m == 0:
        assert not dots.any()
    else:
        # of the size of the sum's terms, which may cancel
        size = (x.double() * y.double()).abs().sum(0)
        assert ((dots.double() - expected).abs() / size).max() < 1e-6
