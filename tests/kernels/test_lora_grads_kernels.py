"""dS and dB in one pass beside fp64, and when that is chosen."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, product_error, programs_backwards, randn, widen

from fluxfast_kernels import slabs
from fluxfast_kernels.launch import interpreted, pretend
from fluxfast_kernels.lora_grads import SecondGrads, lora_grads
from fluxfast_kernels.matmul import make_segments
from support import bound

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
LARGE = {"BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 4, "num_stages": 2}
# output features and ranks of the linears, rows, and launch numbers
CASES = {
    "one row, one rank": ((37,), (1,), 1, SMALL),
    "one tile": ((16,), (5,), 63, SMALL),
    "odd width, several ranges": ((131,), (5,), 200, SMALL),
    "segments, one without": ((48, 16, 80), (3, 0, 7), 63, SMALL),
    "segments of unequal tiles": ((16, 112, 32), (4, 16, 8), 66, SMALL),
    "many rows, many ranks": ((1008, 48), (63, 2), 1000, LARGE),
    "a whole block of ranks": ((144,), (128,), 65, SMALL),
    "no rows": ((48, 16), (3, 2), 0, SMALL),
}


def operands(outs, ranks, m, dtype, seed=0):
    """dy, s, B with NaN where a linear does not use its width, and the scale of each rank."""
    n, widest = sum(outs), max(ranks)
    b = randn(n, widest, seed=seed + 1).to(dtype)
    col = 0
    for out, r in zip(outs, ranks, strict=True):
        b[col : col + out, r:] = float("nan")
        col += out
    dy, s = randn(m, n, seed=2).to(dtype), randn(m, sum(ranks), seed=3).to(dtype)
    return dy, s, b, 1 / torch.arange(1 + seed, sum(ranks) + 1 + seed, device=DEVICE)


def run(outs, ranks, dy, s, b, scale, second=None, *, passes=1, numbers=SMALL):
    """dS and dB in fp32, and the second part's dB; second: rows, B and scale."""
    segments = make_segments(outs, ranks, DEVICE) if len(outs) > 1 else None
    ds = torch.empty(s.shape, dtype=dy.dtype, device=DEVICE)
    db, db_2 = (torch.empty(b.shape, dtype=torch.float32, device=DEVICE) for _ in range(2))
    if second is not None:
        rows, b_2, scale_2 = second
        second = SecondGrads(rows, b_2, db_2, scale_2)
    lora_grads(
        dy, s, b, ds, db, scale=scale, segments=segments, second=second, passes=passes,
        numbers=numbers,
    )  # fmt: skip
    return ds, db, db_2


def check(outs, ranks, dy, s, b, scale, ds, db):
    """Compares a part's dS and dB with fp64."""
    col = rank = 0
    for n, r in zip(outs, ranks, strict=True):
        dy_i, s_i = dy[:, col : col + n], s[:, rank : rank + r]
        b_i = b[col : col + n, :r].double() * scale[rank : rank + r]
        assert product_error(ds[:, rank : rank + r], dy_i, b_i) < bound(ds.dtype)
        assert product_error(db[col : col + n, :r], dy_i.T, s_i) < bound(db.dtype)
        assert not db[col : col + n, r:].any()
        col, rank = col + n, rank + r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_beside_fp64(case, dtype):
    outs, ranks, m, numbers = CASES[case]
    given = operands(outs, ranks, m, dtype)
    ds, db, _ = run(outs, ranks, *given, numbers=numbers)
    check(outs, ranks, *given, ds, db)
    assert not slabs.semaphores(1, ds.device).any()


@pytest.mark.parametrize("rows", [0, 1, 63, 139, 140])
@pytest.mark.parametrize(("outs", "ranks"), [((48, 16, 80), (3, 0, 7)), ((37,), (5,))])
def test_two_parts(outs, ranks, rows):
    m, dtype = 140, torch.float16
    dy, s, b, scale = operands(outs, ranks, m, dtype)
    _, _, b_2, scale_2 = operands(outs, ranks, m, dtype, seed=7)
    ds, *both = run(outs, ranks, dy, s, b, scale, (rows, b_2, scale_2))
    first, other = slice(0, rows), slice(rows, m)
    check(outs, ranks, dy[first], s[first], b, scale, ds[first], both[0])
    check(outs, ranks, dy[other], s[other], b_2, scale_2, ds[other], both[1])


@pytest.mark.skipif(not interpreted(), reason="a GPU runs programs in an order of its own")
def test_the_order_of_programs_changes_no_bit():
    outs, ranks, dtype = (48, 16, 80), (3, 0, 7), torch.float32
    dy, s, b, scale = operands(outs, ranks, 140, dtype)
    second = 63, b.flip(0).nan_to_num(), scale
    first, again = (run(outs, ranks, dy, s, b, scale, second) for _ in range(2))
    with programs_backwards():
        backwards = run(outs, ranks, dy, s, b, scale, second)
    for got in (again, backwards):
        assert all(torch.equal(x, y) for x, y in zip(got, first, strict=True))
    other = run(outs, ranks, dy, s, b, scale, second, numbers=SMALL | {"BLOCK_N": 64})
    assert not torch.equal(other[0], first[0])
    check(outs, ranks, dy[:63], s[:63], b, scale, other[0][:63], other[1])


def test_strided_rows_and_outputs_in_wider_buffers():
    outs, ranks, dtype = (48, 80), (3, 5), torch.float16
    dy, s, b, scale = operands(outs, ranks, 130, dtype)
    dy, s, b = widen(dy, 5, 7), widen(s, 3, 0), widen(b, 1, 2)
    ds, db = widen(torch.zeros_like(s), 3, 4), widen(torch.zeros(b.shape, device=DEVICE), 2, 1)
    lora_grads(
        dy, s, b, ds, db, scale=scale, segments=make_segments(outs, ranks, DEVICE), passes=1,
        numbers=SMALL,
    )  # fmt: skip
    check(outs, ranks, dy, s, b, scale, ds, db)
    for out, left in ((ds, 3), (db, 2)):
        assert (
            out._base[:, :left].isnan().all() and out._base[:, left + out.shape[1] :].isnan().all()
        )


@pytest.mark.parametrize(
    ("arch", "rank", "dtype", "m", "kernels"),
    [
        ("sm_90", 16, torch.bfloat16, 4608, ["lora_grads"]),
        # slabs would be more than a third of dy: of many ranks, of a few rows, of narrow tiles
        ("sm_90", 64, torch.bfloat16, 4608, ["lora_down", "lora_outer"]),
        ("sm_90", 16, torch.bfloat16, 1, ["lora_down", "lora_outer"]),
        ("sm_90", 16, torch.float32, 4608, ["lora_down", "lora_outer"]),
        ("sm_80", 16, torch.bfloat16, 4608, ["lora_down", "lora_outer"]),
    ],
)
def test_one_pass_where_slabs_are_small(arch, rank, dtype, m, kernels, monkeypatch):
    # as a compiled kernel would be chosen: the interpreter's bf16 products are in fp32
    monkeypatch.setattr("fluxfast_kernels.matmul.interpreted", lambda: False)
    seen = []
    outs, meta = (3072,) * 3, torch.device("meta")
    dy, s, b, ds, db = (
        torch.empty(*shape, dtype=dtype, device=meta)
        for shape in [(m, 9216), (m, 3 * rank), (9216, rank), (m, 3 * rank), (9216, rank)]
    )
    with pretend(arch, lambda kernel, args, numbers: seen.append(kernel.__name__)):
        lora_grads(dy, s, b, ds, db, segments=make_segments(outs, (rank,) * 3, "meta"))
    assert seen == [f"{name}_kernel" for name in kernels]
