"""`matmul` on codes, on small tiles: exact sums, its epilogue, both directions and layouts."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, product_bound, randn, widen
from packaging.version import Version

from fluxfast_kernels import matmul as matmul_module
from fluxfast_kernels.launch import interpreted
from fluxfast_kernels.matmul import matmul
from fluxfast_kernels.product_tile import make_segments
from fluxfast_kernels.quant_matmul import transpose_codes
from fluxfast_kernels.row_quant import row_quant
from support import bound, relative_error

# small tiles, so that small operands take several of them, a last one that is not full, and a last
# group that is not full
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 3, "num_warps": 4, "num_stages": 2}
SHAPES = [(1, 16, 16), (17, 48, 80), (63, 80, 112), (2, 37, 51)]
FORMATS = ["int8", "e4m3"]


def codes(rows: int, cols: int, fmt: str, seed: int) -> torch.Tensor:
    """Codes over the whole range, both ends and e4m3's minus zero among them."""
    if fmt == "int8":
        q = randn(rows, cols, seed=seed, scale=60).round().clamp(-127, 127).to(torch.int8)
        q.view(-1)[:2] = torch.tensor([127, -127])
        return q
    q = randn(rows, cols, seed=seed, scale=100).clamp(-448, 448).to(torch.float8_e4m3fn)
    q.view(-1)[:4] = torch.tensor([448.0, -448.0, -0.0, 2.0**-9]).to(q.dtype)
    return q


def scales(n: int, seed: int) -> torch.Tensor:
    return (0.002 + 0.01 * randn(n, seed=seed).abs()).float()


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.double() @ w.double().T


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(fmt, m, n, k, dtype):
    x, w = codes(m, k, fmt, 1), codes(n, k, fmt, 2)
    x_scale, w_scale, bias = scales(m, 3), scales(n, 4), randn(n, seed=5).to(dtype)
    y = matmul(x, w, x_scale=x_scale, w_scale=w_scale, bias=bias, out_dtype=dtype, numbers=TILE)
    expected = product(x, w) * x_scale[:, None] * w_scale + bias
    assert y.dtype == dtype and relative_error(y, expected) < product_bound(dtype, fmt)


@pytest.mark.parametrize("w_transposed", [False, True])
def test_integer_sums_are_exact(w_transposed):
    """Sums past 2²⁴, where fp32 would have lost bits: only the finished sum is rounded."""
    m, n, k = 3, 16, 1100
    x, w = codes(m, k, "int8", 1), codes(n, k, "int8", 2)
    x[0], w[0], w[1] = 127, 127, -127
    w_kernel = transpose_codes(w).T if w_transposed else w
    one = torch.ones(max(m, n), device=DEVICE)
    numbers = TILE | {"BLOCK_K": 128}
    y = matmul(
        x, w_kernel, x_scale=one[:m], w_scale=one[:n], out_dtype=torch.float32, numbers=numbers
    )
    exact = (
        x.long() @ w.long().T if DEVICE == "cpu" else (x.cpu().long() @ w.cpu().long().T).to(DEVICE)
    )
    assert int(exact.abs().max()) == 127 * 127 * k > 2**24
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dgrad_reads_the_same_weight_in_both_layouts(fmt, m, n, k):
    dy, w, dy_scale = codes(m, n, fmt, 1), codes(n, k, fmt, 2), scales(m, 3)
    dx = matmul(dy, w.T, x_scale=dy_scale, out_dtype=torch.float32, numbers=TILE)
    expected = dy.double() @ w.double() * dy_scale[:, None]
    assert dx.shape == (m, k) and relative_error(dx, expected) < product_bound(dx.dtype, fmt)
    w_t = transpose_codes(w)
    assert w_t.is_contiguous() and torch.equal(w_t.view(torch.int8), w.view(torch.int8).T)
    again = matmul(dy, w_t.T.T, x_scale=dy_scale, out_dtype=torch.float32, numbers=TILE)
    # int8's sums are exact in any order
    assert (
        torch.equal(dx, again)
        if fmt == "int8"
        else relative_error(again, expected) < product_bound(dx.dtype, fmt)
    )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, torch.float32), (3, torch.bfloat16), (16, torch.float16), (45, torch.float32)],
)
def test_low_rank_term_in_both_directions(fmt, rank, dtype):
    m, n, k = 17, 48, 80
    x, w, dy = codes(m, k, fmt, 1), codes(n, k, fmt, 2), codes(m, n, fmt, 6)
    x_scale, w_scale = scales(m, 3), scales(n, 4)
    # a slice of the columns of a wider s, as a group's packed one gives it; B is kept in fp32
    # whatever the output's type
    s, b, a = (
        widen(randn(m, rank, seed=7).to(dtype), 3, 2),
        randn(n, rank, seed=8).float(),
        randn(rank, k, seed=9).to(dtype),
    )
    y = matmul(x, w, x_scale=x_scale, w_scale=w_scale, u=s, v=b, out_dtype=dtype, numbers=TILE)
    expected = product(x, w) * x_scale[:, None] * w_scale + product(s, b.to(dtype))
    assert relative_error(y, expected) < product_bound(dtype, fmt)
    dx = matmul(dy, w.T, x_scale=x_scale, u=s, v=a.T, out_dtype=dtype, numbers=TILE)
    expected = dy.double() @ w.double() * x_scale[:, None] + s.double() @ a.double()
    assert relative_error(dx, expected) < product_bound(dtype, fmt)


def test_groups_of_linears_with_adapters_of_their_own():
    outs, ranks = (48, 16, 64), (3, 0, 5)
    m, k, n, total, widest = 19, 64, sum(outs), sum(ranks), max(ranks)
    x, w, x_scale, w_scale = (
        codes(m, k, "int8", 1),
        codes(n, k, "int8", 2),
        scales(m, 3),
        scales(n, 4),
    )
    s, b, bias = (
        randn(m, total, seed=5).float(),
        randn(n, widest, seed=6).float(),
        randn(n, seed=7).float(),
    )
    segments = make_segments(outs, ranks, DEVICE)
    y = matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, bias=bias, u=s, v=b, segments=segments,
        out_dtype=torch.float32, numbers=TILE,
    )  # fmt: skip
    expected = product(x, w) * x_scale[:, None] * w_scale + bias
    col = rank = 0
    for n_i, r in zip(outs, ranks, strict=True):
        expected[:, col : col + n_i] += product(s[:, rank : rank + r], b[col : col + n_i, :r])
        col, rank = col + n_i, rank + r
    assert relative_error(y, expected) < bound(torch.float32)


def test_segments_must_be_aligned():
    with pytest.raises(ValueError, match="multiples of 16"):
        make_segments((32, 24), (4, 4), DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_out_is_a_slice_and_can_be_added_to(dtype):
    m, n, k = 17, 48, 80
    x, w, x_scale, w_scale = (
        codes(m, k, "int8", 1),
        codes(n, k, "int8", 2),
        scales(m, 3),
        scales(n, 4),
    )
    plain = matmul(x, w, x_scale=x_scale, w_scale=w_scale, out_dtype=dtype, numbers=TILE)
    out = widen(torch.full_like(plain, float("nan")))
    assert matmul(x, w, x_scale=x_scale, w_scale=w_scale, out=out, numbers=TILE) is out
    wide = out._base
    assert (
        torch.equal(out, plain) and wide[:, :16].isnan().all() and wide[:, 16 + n :].isnan().all()
    )
    dy, held = codes(m, n, "int8", 5), randn(m, k, seed=6).to(dtype)
    dx = widen(held)
    matmul(dy, w.T, x_scale=x_scale, out=dx, accumulate=True, numbers=TILE)
    assert relative_error(dx, held.double() + dy.double() @ w.double() * x_scale[:, None]) < bound(
        dtype
    )
    assert dx._base[:, :16].isnan().all() and dx._base[:, 16 + k :].isnan().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_that_are_hard(fmt):
    m, n, k = 6, 32, 64
    values = randn(m, k, seed=1).float()
    values[0] = 0
    values[1, 5] = 3e4
    values[2, 7] = float("nan")
    values[3, 7] = float("inf")
    x, x_scale = row_quant(values, fmt)
    w, w_scale, bias = codes(n, k, fmt, 2), scales(n, 3), randn(n, seed=4).float()
    y = matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, bias=bias, out_dtype=torch.float32, numbers=TILE
    )
    assert torch.equal(y[0], bias) and not y[2].isfinite().any() and not y[3].isfinite().any()
    clean = [0, 1, 4, 5]
    expected = product(x[clean], w) * x_scale[clean, None] * w_scale + bias
    assert relative_error(y[clean], expected) < product_bound(y.dtype, fmt)


@pytest.mark.parametrize(("fmt", "error"), [("int8", 0.02), ("e4m3", 0.06)])
def test_scales_folded_into_dy_give_the_gradient(fmt, error):
    """dgrad of a weight that is quantised per row, against the exact one.

    Kernels of this precision measure 0.009 and 0.027.
    """
    m, n, k = 33, 96, 64
    weight, dy = (
        randn(n, k, seed=1).float() * torch.linspace(0.1, 4, n, device=DEVICE)[:, None],
        randn(m, n, seed=2).float(),
    )
    w, w_scale = row_quant(weight, fmt)
    dyq, dy_scale = row_quant(dy, fmt, col_scale=w_scale)
    dx = matmul(dyq, w.T, x_scale=dy_scale, out_dtype=torch.float32, numbers=TILE)
    assert relative_error(dx, dy.double() @ (w.double() * w_scale[:, None].double())) < error


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_rows_on_codes(fmt, dtype):
    m, n, k = 17, 48, 80
    x, w, w_scale, bias = (
        randn(m, k, seed=1).to(dtype),
        codes(n, k, fmt, 2),
        scales(n, 3),
        randn(n, seed=4).to(dtype),
    )
    y = matmul(x, w, x_scale=None, w_scale=w_scale, bias=bias, out_dtype=dtype, numbers=TILE)
    assert relative_error(y, product(x, w) * w_scale + bias) < bound(dtype)
    dy = (randn(m, n, seed=5) * w_scale).to(dtype)
    dx = matmul(dy, w.T, x_scale=None, out_dtype=dtype, numbers=TILE)
    assert relative_error(dx, dy.double() @ w.double()) < bound(dtype)


@triton.jit
def fnuz_codes_kernel(p_in, p_out):
    o = tl.arange(0, 256)
    b_code = matmul_module.as_type(tl.load(p_in + o), tl.float8e4b8)
    tl.store(p_out + o, b_code.to(tl.uint8, bitcast=True))


# older interpreters do not know the type, and a GPU other than gfx942 does not either
in_gfx942s_bias = pytest.mark.skipif(
    not interpreted() or Version(triton.__version__) < Version("3.9"),
    reason="needs an interpreter that knows fp8e4b8",
)


@in_gfx942s_bias
def test_e4m3fn_in_gfx942s_bias(monkeypatch):
    monkeypatch.setattr(matmul_module, "arch_key", lambda device: "gfx942")
    m, n, k = 17, 48, 80
    x, w, x_scale, w_scale = (
        codes(m, k, "e4m3", 1),
        codes(n, k, "e4m3", 2),
        scales(m, 3),
        scales(n, 4),
    )
    assert matmul_module.product_type(x, w, torch.float32) == tl.float8e4b8
    y = matmul(x, w, x_scale=x_scale, w_scale=w_scale, out_dtype=torch.float32, numbers=TILE)
    assert relative_error(y, product(x, w) * x_scale[:, None] * w_scale) < bound(torch.float32)


@in_gfx942s_bias
def test_minus_zero_is_nan_in_gfx942s_bias():
    every = torch.arange(256, dtype=torch.uint8)
    out = torch.empty_like(every)
    fnuz_codes_kernel[(1,)](every.view(torch.float8_e4m3fn), out)
    assert torch.equal(out, torch.where(every == 0x80, 0, every))


def test_no_rows():
    x, w = codes(4, 32, "int8", 1)[:0], codes(16, 32, "int8", 3)
    scales_of = {"x_scale": scales(4, 2)[:0], "w_scale": scales(16, 4)}
    y = matmul(x, w, **scales_of, out_dtype=torch.bfloat16, numbers=TILE)
    assert y.shape == (0, 16) and y.dtype == torch.bfloat16
