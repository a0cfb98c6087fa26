"""The kernels of linears with LoRA beside fp64: forward and every gradient, and each alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, randn, widen

from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.lora_linear import lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast_kernels.lora_linear import lora_down, lora_outer
from fluxfast_kernels.matmul import matmul
from fluxfast_kernels.product_tile import make_segments
from fluxfast_kernels.row_quant import row_quant
from fluxfast_kernels.tiles import TILES
from support import bound, relative_error

# small tiles, so that small operands take several of them, a last one that is not full, and a last
# group that is not full
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 3, "num_warps": 4, "num_stages": 2}
# sums are cut into parts of at least four blocks: 64 rows or columns
NARROW = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


def lora_grads(
    dy, s, x, b, *, scale=None, x_scale=None, segments=None, grad_dtype=torch.float32, numbers=None
):
    """dS, dA and dB, as a backward pass asks for them."""
    ds = torch.empty_like(s, dtype=dy.dtype)
    lora_down(dy, b.T, ds, scale=scale, segments=segments, numbers=numbers)
    db = torch.empty(b.shape, dtype=grad_dtype, device=b.device)
    lora_outer(dy, s, db, segments=segments, numbers=numbers)
    da = torch.empty((ds.shape[1], x.shape[1]), dtype=grad_dtype, device=x.device)
    return ds, lora_outer(x, ds, da, x_scale=x_scale, transposed=True, numbers=numbers), db


def down(x, a, dtype=None, **options):
    """s = x Aᵀ in `dtype`, x's own by default."""
    s = torch.empty((x.shape[0], a.shape[0]), dtype=dtype or x.dtype, device=x.device)
    return lora_down(x, a, s, **options)


def group(outs, ranks, k, m, dtype, seed=0):
    """A group of linears as torch sees it, in fp64 and each adapter apart, and as kernels do.

    ranks: of each linear, the ranks of its adapters. Every number is one of dtype's, so that both
    see the same.
    """
    g = iter(range(seed, seed + 1000))

    def draw(*shape, scale=1.0):
        return randn(*shape, seed=next(g), scale=scale).to(dtype).double()

    x = draw(m, k).requires_grad_()
    linears, a_all, scale_all, b_rows = [], [], [], []
    widest = max(sum(r) for r in ranks)
    for n, linear_ranks in zip(outs, ranks, strict=True):
        adapters = []
        for r in linear_ranks:
            a, b = draw(r, k, scale=k**-0.5).requires_grad_(), draw(n, r).requires_grad_()
            adapters.append(Lora(a, b, 0.25 * (1 + len(a_all) % 3)))
            a_all.append(a)
            scale_all += [adapters[-1].scale] * r
        linears.append(LinearParams(draw(n, k, scale=k**-0.5), draw(n), tuple(adapters)))
        # what a linear does not use of B's width must not matter
        spare = torch.full((n, widest - sum(linear_ranks)), float("nan"), device=DEVICE)
        b_rows.append(torch.cat([*(ad.b.detach() for ad in adapters), spare], dim=1))
    packed = {
        "x": x.detach().to(dtype),
        "w": torch.cat([p.weight for p in linears]).to(dtype),
        "bias": torch.cat([p.bias for p in linears]).to(dtype),
        "a": torch.cat([a.detach() for a in a_all]).to(dtype),
        "b": torch.cat(b_rows).to(dtype),
        "scale": torch.tensor(scale_all, device=DEVICE),
        "segments": make_segments(outs, [sum(r) for r in ranks], DEVICE) if len(outs) > 1 else None,
    }
    return x, linears, packed


GROUPS = {
    "one, rank 1": ((48,), ((1,),), 40, 1),
    "one, rank 3, two adapters": ((37,), ((2, 1),), 51, 17),
    "one, rank 16": ((80,), ((16,),), 112, 63),
    "three, odd ranks, one without": ((48, 16, 64), ((3,), (), (2, 5)), 80, 33),
    "four, rank 16": ((32, 32, 32, 96), ((16,),) * 4, 64, 17),
    "one, rank past a block": ((32,), ((70,),), 48, 17),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GROUPS)
def test_forward_and_every_gradient(case, dtype):
    outs, ranks, k, m = GROUPS[case]
    x, linears, p = group(outs, ranks, k, m, dtype)
    expected = lora_linear_ref(x, linears)
    dy = randn(m, sum(outs), seed=99).to(dtype)
    adapters = [ad for linear in linears for ad in linear.adapters]
    wanted = torch.autograd.grad(
        expected, [x, *(t for ad in adapters for t in (ad.a, ad.b))], dy.double()
    )

    s = down(p["x"], p["a"], scale=p["scale"], numbers=NARROW)
    y = matmul(
        p["x"],
        p["w"],
        bias=p["bias"],
        u=s,
        v=p["b"],
        segments=p["segments"],
        numbers=TILE,
    )
    ds, da, db = lora_grads(
        dy, s, p["x"], p["b"], scale=p["scale"], segments=p["segments"], numbers=NARROW
    )
    dx = matmul(dy, p["w"].T, u=ds, v=p["a"].T, numbers=TILE)

    # s and dS are stored in dtype between two products: that rounding comes on top of the output's
    error = 2 * bound(dtype)
    assert (
        y.dtype == dx.dtype == s.dtype == ds.dtype == dtype
        and da.dtype == db.dtype == torch.float32
    )
    assert relative_error(y, expected) < error
    assert relative_error(dx, wanted[0]) < error
    pairs, grads, col, row = iter(wanted[1:]), [], 0, 0
    for n, linear in zip(outs, linears, strict=True):
        rank = 0
        for adapter in linear.adapters:
            r = adapter.a.shape[0]
            grads += [
                (da[row : row + r], next(pairs)),
                (db[col : col + n, rank : rank + r], next(pairs)),
            ]
            rank, row = rank + r, row + r
        assert not db[col : col + n, rank:].any()
        col += n
    for actual, reference in grads:
        assert relative_error(actual, reference) < error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (63, 80, 112), (2, 37, 51)])
def test_without_adapters(m, n, k, dtype):
    x, w, dy = (
        randn(m, k, seed=1).to(dtype),
        randn(n, k, seed=2).to(dtype),
        randn(m, n, seed=3).to(dtype),
    )
    assert relative_error(matmul(x, w, numbers=TILE), x.double() @ w.double().T) < bound(dtype)
    assert relative_error(matmul(dy, w.T, numbers=TILE), dy.double() @ w.double()) < bound(dtype)


def test_storage_of_another_dtype_is_cast_as_it_is_read():
    m, n, k, rank = 17, 48, 64, 5
    x, dy = randn(m, k, seed=1).to(torch.float16), randn(m, n, seed=2).to(torch.float16)
    w, a, b = (
        randn(*shape, seed=3 + i).float() for i, shape in enumerate([(n, k), (rank, k), (n, rank)])
    )
    s = down(x, a, numbers=NARROW)
    assert s.dtype == torch.float16 and relative_error(s, x.double() @ a.half().double().T) < bound(
        torch.float16
    )
    y = matmul(x, w, u=s, v=b, numbers=TILE)
    expected = x.double() @ w.half().double().T + s.double() @ b.half().double().T
    assert y.dtype == torch.float16 and relative_error(y, expected) < bound(torch.float16)
    ds, _, _ = lora_grads(dy, s, x, b, numbers=NARROW)
    dx = matmul(dy, w.T, u=ds, v=a.T, numbers=TILE)
    expected = dy.double() @ w.half().double() + ds.double() @ a.half().double()
    assert dx.dtype == torch.float16 and relative_error(dx, expected) < bound(torch.float16)


def test_strided_rows_and_outputs_in_wider_buffers():
    m, n, k, rank = 33, 48, 64, 3
    x, dy, s = (widen(randn(m, cols, seed=i).float(), 16, 5) for i, cols in enumerate([k, n, rank]))
    w, a, b = (
        randn(n, k, seed=4).float(),
        randn(rank, k, seed=5).float(),
        randn(n, rank, seed=6).float(),
    )
    out, dx = widen(torch.zeros(m, n, device=DEVICE)), widen(randn(m, k, seed=7).float())
    held = dx.double()
    matmul(x, w, u=s, v=b, out=out, numbers=TILE)
    assert relative_error(out, x.double() @ w.double().T + s.double() @ b.double().T) < bound(
        torch.float32
    )
    assert out._base[:, :16].isnan().all() and out._base[:, 16 + n :].isnan().all()
    ds, da, db = lora_grads(dy, s, x, b, numbers=NARROW)
    matmul(dy, w.T, u=ds, v=a.T, out=dx, accumulate=True, numbers=TILE)
    expected_ds = dy.double() @ b.double()
    assert relative_error(dx, held + dy.double() @ w.double() + expected_ds @ a.double()) < bound(
        torch.float32
    )
    assert relative_error(da, expected_ds.T @ x.double()) < bound(torch.float32)
    assert relative_error(db, dy.double().T @ s.double()) < bound(torch.float32)
    assert relative_error(down(x, a, numbers=NARROW), x.double() @ a.double().T) < bound(
        torch.float32
    )


@pytest.mark.parametrize("outs", [(96,), (80, 48)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_sums_cut_into_parts_are_reproducible(outs, grad_dtype):
    """More than 64 rows or columns make two parts, but the short segment has one."""
    m, k, ranks = 70, 72, (3, 2)[: len(outs)]
    n, total = sum(outs), sum(ranks)
    segments = make_segments(outs, ranks, DEVICE) if len(outs) > 1 else None
    dy, x, s = (
        randn(m, n, seed=1).float(),
        randn(m, k, seed=2).float(),
        randn(m, total, seed=3).float(),
    )
    b, a, scale = (
        randn(n, 3, seed=4).float(),
        randn(total, k, seed=5).float(),
        1 / torch.arange(1, total + 1, device=DEVICE),
    )
    options = {"scale": scale, "segments": segments, "grad_dtype": grad_dtype, "numbers": NARROW}
    first, second = (lora_grads(dy, s, x, b, **options) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    ds, db, col, rank = torch.zeros_like(s).double(), torch.zeros_like(b).double(), 0, 0
    for n_i, r in zip(outs, ranks, strict=True):
        cols, own = slice(col, col + n_i), slice(rank, rank + r)
        ds[:, own] = dy[:, cols].double() @ b[cols, :r].double() * scale[own]
        db[cols, :r] = dy[:, cols].double().T @ s[:, own].double()
        col, rank = col + n_i, rank + r
    wanted = [(ds, torch.float32), (ds.T @ x.double(), grad_dtype), (db, grad_dtype)]
    for actual, (expected, dtype) in zip(first, wanted, strict=True):
        assert actual.dtype == dtype and relative_error(actual, expected) < bound(dtype)
    s = down(x, a, scale=scale, numbers=NARROW)
    assert relative_error(s, x.double() @ a.double().T * scale) < bound(torch.float32)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_adapters_read_the_rows_that_the_product_reads(fmt):
    """A producer may have written x as codes and scales only."""
    m, n, k, rank = 33, 32, 80, 3
    x, x_scale = row_quant(
        randn(m, k, seed=1).float() * torch.linspace(0.1, 9, m, device=DEVICE)[:, None], fmt
    )
    a, dy = randn(rank, k, seed=2).float(), randn(m, n, seed=3).float()
    values = x.double() * x_scale[:, None].double()
    s = down(x, a, torch.float32, x_scale=x_scale, numbers=NARROW)
    assert relative_error(s, values @ a.double().T) < bound(torch.float32)
    b = randn(n, rank, seed=4).float()
    ds, da, _ = lora_grads(dy, s, x, b, x_scale=x_scale, numbers=NARROW)
    assert relative_error(da, ds.double().T @ values) < bound(torch.float32)


def test_rows_of_zeros_and_outliers():
    m, n, k, rank = 17, 32, 48, 3
    x, w = randn(m, k, seed=1).to(torch.float16), randn(n, k, seed=2, scale=0.1).to(torch.float16)
    x[0], x[1, 3] = 0, 3e4
    shapes = [(rank, k), (n, rank), (n,)]
    a, b, bias = (
        randn(*shape, seed=3 + i, scale=0.1).to(torch.float16) for i, shape in enumerate(shapes)
    )
    s = down(x, a, numbers=NARROW)
    y = matmul(x, w, bias=bias, u=s, v=b, numbers=TILE)
    assert not s[0].any() and torch.equal(y[0], bias)
    expected = x.double() @ w.double().T + bias + s.double() @ b.double().T
    for row in range(m):
        assert relative_error(y[row], expected[row]) < bound(torch.float16)


def test_no_rows():
    x, w, a, b = (
        torch.zeros(shape, device=DEVICE) for shape in [(0, 32), (16, 32), (3, 32), (16, 3)]
    )
    s = down(x, a, numbers=NARROW)
    assert s.shape == (0, 3) and matmul(x, w, u=s, v=b, numbers=TILE).shape == (
        0,
        16,
    )
    ds, da, db = lora_grads(x.new_zeros(0, 16), s, x, b, numbers=NARROW)
    assert ds.shape == (0, 3) and not da.any() and not db.any()


# in a process of its own: under the interpreter nothing is recorded
RECORD = """
import json
import torch
from fluxfast_kernels import aot
from fluxfast_kernels.lora_grads import lora_grads
from fluxfast_kernels.matmul import matmul
from fluxfast_kernels.product_tile import make_segments
from fluxfast_kernels.lora_linear import lora_down, lora_outer

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def step(m):
    outs, rank = (3072, 3072, 3072), 3
    segments, total, n = make_segments(outs, (rank,) * 3, "meta"), 3 * rank, sum(outs)
    x, dy, w, a, b = meta(m, 3072), meta(m, n), meta(n, 3072), meta(total, 3072), meta(n, rank)
    scale, n_scale, m_scale = (meta(size, dtype=torch.float32) for size in (total, n, m))
    xq, dyq, wq = (t.to(torch.int8) for t in (x, dy, w))
    s = lora_down(x, a, meta(m, total), scale=scale)
    matmul(x, w, u=s, v=b, segments=segments)
    ds, db = meta(m, total), meta(n, rank, dtype=torch.float32)
    lora_grads(dy, s, b, ds, db, scale=scale, segments=segments)
    lora_outer(x, ds, meta(total, 3072, dtype=torch.float32), transposed=True)
    matmul(dy, w.T, u=ds, v=a.T)
    bf16 = torch.bfloat16
    matmul(xq, wq, x_scale=m_scale, w_scale=n_scale, u=s, v=b, segments=segments, out_dtype=bf16)
    matmul(dyq, wq.T, x_scale=m_scale, u=ds, v=a.T, out_dtype=bf16)

def plain(v):
    return [v.name, dict(v.signature), sorted(v.constexprs.items()), v.divisible, v.num_warps,
    v.num_stages]

counts = (1, 17, 512, 1024, 1531, 4608)
steps = [aot.record_variants([("", lambda: step(m), ("sm_90",))]) for m in counts]
print(json.dumps([[plain(v) for v in step] for step in steps], default=str))
"""


def test_token_counts_share_their_kernels():
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    process = subprocess.run(
        [sys.executable, "-c", RECORD], env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, set[str]] = {}
    for step in json.loads(process.stdout):
        for name, *rest in step:
            found.setdefault(name, set()).add(json.dumps(rest))
    # four wide products, each in as many kernels as it has tiles on sm_90, int8's forward in the
    # persistent one; s and dS, whose sums are cut; dA and dB, where theirs are and where not; and
    # dS and dB in one pass
    tiles = {kind: len(TILES[kind]["sm_90"]) for kind in TILES if "sm_90" in TILES[kind]}
    plain = tiles["half"] + tiles["half_t"] + tiles["int8_t"]
    assert {name: len(variants) for name, variants in found.items()} == {
        "matmul-": plain, "persistent_matmul-": tiles["int8_persistent"],
        "lora_down-": 2, "lora_outer-": 4, "lora_grads-": 1,
    }  # fmt: skip
