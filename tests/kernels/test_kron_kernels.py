"""LoKr's kernels, beside the Kronecker product formed whole in fp64."""

import pytest
import torch

from fluxfast_kernels.kron import kron_add, kron_backward
from support import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32: sums of a few hundred terms; 16 bits: what lies between the two products is rounded, too
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# M, O1, I1, O2, I2
SIZES = [
    (1, 1, 1, 1, 1),
    (63, 16, 16, 24, 40),
    (5, 1, 3, 7, 5),
    (3, 8, 2, 33, 17),
    (2, 70, 3, 5, 6),
    (2, 3, 130, 5, 6),
    (1000, 2, 2, 9, 3),
    (4, 4, 12, 1, 100),
]


def rand(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def operands(m, o1, i1, o2, i2, dtype):
    """x, dy, what y and dx had before, w1, w2; each of values that its type holds."""
    shapes = [(m, i1 * i2), (m, o1 * o2), (m, o1 * o2), (m, i1 * i2)]
    rows = [rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return *rows, rand(o1, i1, dtype=dtype, seed=5), rand(o2, i2, dtype=dtype, seed=6)


def wanted(x, dy, y, dx, w1, w2, scale, cols):
    x, dy, y, dx, w1, w2, cols = (t.double() for t in (x, dy, y, dx, w1, w2, cols))
    whole, dy = torch.kron(w1, w2), dy * cols * scale
    of_whole = (dy.T @ x).view(len(w1), len(w2), w1.shape[1], w2.shape[1])
    return (
        y + scale * cols * (x @ whole.T),
        dx + dy @ whole,
        torch.einsum("jcik,ck->ji", of_whole, w2),
        torch.einsum("jcik,ji->ck", of_whole, w1),
    )


def run(x, dy, y, dx, w1, w2, scale, cols, x_scale=None):
    y, dx = y.clone(), dx.clone()
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    kron_add(x, w1, w2, y, scale=scale, x_scale=x_scale, y_cols=cols)
    kron_backward(dy, x, w1, w2, dw1, dw2, dx, scale=scale, x_scale=x_scale, dy_cols=cols)
    return y, dx, dw1, dw2


def agree(made, expected, dtype):
    for i, (one, other) in enumerate(zip(made, expected, strict=True)):
        assert relative_error(one, other) < TOLERANCES[dtype], i


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_values_and_gradients(size, dtype):
    given = operands(*size, dtype)
    cols = rand(size[1] * size[3], dtype=torch.float32, seed=7)
    agree(run(*given, 0.5, cols), wanted(*given, 0.5, cols), dtype)


def test_rows_that_lie_apart_and_factors_in_either_order():
    m, o1, i1, o2, i2 = size = 9, 6, 5, 8, 7
    x, dy, y, dx, w1, w2 = operands(*size, torch.float32)
    wide = [torch.full((m, 2 * t.shape[1] + 1), torch.nan, device=DEVICE) for t in (x, dy, y, dx)]
    apart = []
    for t, room in zip((x, dy, y, dx), wide, strict=True):
        room[:, 1 : 1 + t.shape[1]] = t
        apart.append(room[:, 1 : 1 + t.shape[1]])
    cols = torch.ones(o1 * o2, device=DEVICE)
    expected = wanted(x, dy, y, dx, w1, w2, 2.0, cols)
    a_x, a_dy, a_y, a_dx = apart
    w1, w2 = w1.T.contiguous().T, w2.T.contiguous().T
    dw1, dw2 = torch.empty(i1, o1, device=DEVICE).T, torch.empty(o2, i2, device=DEVICE)
    kron_add(a_x, w1, w2, a_y, scale=2.0)
    kron_backward(a_dy, a_x, w1, w2, dw1, dw2, a_dx, scale=2.0)
    agree((a_y, a_dx, dw1, dw2), expected, torch.float32)
    # nothing beside the rows was touched
    assert all(room[:, 0].isnan().all() and room[:, -1].isnan().all() for room in wide)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_codes(codes):
    size = 7, 5, 12, 9, 10
    x, dy, y, dx, w1, w2 = operands(*size, torch.float32)
    q, x_scale = (x * 20).round().clamp(-100, 100).to(codes), x[:, 0].abs() + 0.1
    cols = torch.ones(45, device=DEVICE)
    values = q.double() * x_scale.double()[:, None]
    expected = wanted(values, dy, y, dx, w1, w2, 1.0, cols)
    agree(run(q, dy, y, dx, w1, w2, 1.0, cols, x_scale), expected, torch.float32)


def test_factors_in_fp32_under_rows_in_bf16():
    size = 9, 4, 4, 12, 20
    x, dy, y, dx, *_ = operands(*size, torch.bfloat16)
    *_, w1, w2 = operands(*size, torch.float32)
    cols = torch.ones(48, device=DEVICE)
    made = run(x, dy, y, dx, w1, w2, 1.0, cols)
    assert made[2].dtype == made[3].dtype == torch.float32
    agree(made, wanted(x, dy, y, dx, w1, w2, 1.0, cols), torch.bfloat16)


def test_no_rows():
    x, dy, y, dx, w1, w2 = operands(0, 2, 3, 4, 5, torch.float32)
    _, _, dw1, dw2 = run(x, dy, y, dx, w1, w2, 1.0, torch.ones(8, device=DEVICE))
    assert not dw1.any() and not dw2.any()


@pytest.mark.parametrize("size", [(300, 16, 16, 24, 40), (40, 3, 130, 5, 6)], ids=str)
def test_the_gradient_of_x_is_optional_and_sums_have_the_same_bits(size):
    x, dy, y, dx, w1, w2 = operands(*size, torch.float32)
    cols = torch.ones(size[1] * size[3], device=DEVICE)
    first, second = (run(x, dy, y, dx, w1, w2, 1.0, cols) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    kron_backward(dy, x, w1, w2, dw1, dw2, None, dy_cols=cols)
    agree((dw1, dw2), first[2:], torch.float32)
