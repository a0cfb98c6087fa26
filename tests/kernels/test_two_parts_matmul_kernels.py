"""Products whose rows have two parts with weights of their own, in one launch of either kernel."""

import pytest
import torch
from kernel_cases import DEVICE, randn, widen
from test_quant_matmul_kernels import codes, product, scales

from fluxfast_kernels import matmul as matmul_module
from fluxfast_kernels.launch import launch
from fluxfast_kernels.matmul import Second, matmul
from fluxfast_kernels.persistent_matmul import persistent_matmul_kernel
from fluxfast_kernels.product_tile import make_segments
from support import bound, relative_error

TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 3, "num_warps": 4, "num_stages": 2}
KERNELS = {
    "plain": {"PERSISTENT": 0},
    "persistent": {"PERSISTENT": 1, "PROGRAMS": 3, "CUT": 0},
    "persistent, cut": {"PERSISTENT": 1, "PROGRAMS": 5, "CUT": 1},
}
OUTS, RANKS, K, M = (48, 16, 64), (8, 0, 3), 80, 70
SEGMENTED = pytest.mark.parametrize("ranks", [RANKS, (16, 8, 16), None])


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, in their order, on an sm_90 that is Triton's interpreter."""
    found = []

    def noted(kernel, *args, **numbers):
        found.append(kernel)
        launch(kernel, *args, **numbers)

    monkeypatch.setattr(matmul_module, "arch_key", lambda device: "sm_90")
    monkeypatch.setattr(matmul_module, "launch", noted)
    monkeypatch.setattr("fluxfast_kernels.persistent_matmul.launch", noted)
    return found


def part(seed, ranks, dtype):
    """What one part's rows meet: w, w_scale, bias, v, and the sizes of its linears and adapters."""
    n, widest = sum(OUTS), 5 if ranks is None else max(ranks)
    w, w_scale = codes(n, K, "int8", seed), scales(n, seed + 1)
    return w, w_scale, randn(n, seed=seed + 2).to(dtype), randn(n, widest, seed=seed + 3).to(dtype)


def expected_of(x, x_scale, own, s, ranks):
    w, w_scale, bias, b = own
    y = product(x, w) * x_scale[:, None] * w_scale + bias
    if ranks is None:
        return y + product(s, b)
    col = rank = 0
    for n, r in zip(OUTS, ranks, strict=True):
        y[:, col : col + n] += product(s[:, rank : rank + r], b[col : col + n, :r])
        col, rank = col + n, rank + r
    return y


@SEGMENTED
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [0, 1, 33, 63, M])
def test_each_part_meets_its_own(kernel, rows, ranks, launched):
    dtype = torch.float16
    first, second = part(10, ranks, dtype), part(20, ranks, dtype)
    x, x_scale = codes(M, K, "int8", 1), scales(M, 2)
    s = widen(randn(M, 5 if ranks is None else sum(ranks), seed=3).to(dtype), 3, 2)
    segments = None if ranks is None else make_segments(OUTS, ranks, DEVICE)
    out = widen(torch.full((M, sum(OUTS)), float("nan"), dtype=dtype, device=DEVICE))
    w, w_scale, bias, b = first
    call = {"w_scale": w_scale, "bias": bias, "v": b, "out": out, "numbers": TILE | KERNELS[kernel]}
    matmul(x, w, x_scale=x_scale, u=s, segments=segments, second=Second(rows, *second), **call)
    assert len(launched) == 1
    assert (launched[0] is persistent_matmul_kernel) == (kernel != "plain")
    for of, own in ((slice(rows), first), (slice(rows, M), second)):
        if x[of].numel():
            expected = expected_of(x[of], x_scale[of], own, s[of], ranks)
            assert relative_error(out[of], expected) < bound(dtype)
    # nothing is written beside it, and no row of one part has met the other's weight
    assert out._base[:, :16].isnan().all() and out._base[:, 16 + sum(OUTS) :].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flipped", [False, True])
def test_dgrad_adds_up_wherever_the_weights_lie(kernel, flipped, launched):
    rows, rank, n = 33, 5, 64
    dy, dy_scale, ds = codes(M, n, "int8", 1), scales(M, 2), randn(M, rank, seed=3).half()
    # transposed copies, as dgrad wants them; the second part's may come before the first's
    weights = codes(2 * K, n, "int8", 4).view(2, K, n)
    w_t, w_t_2 = (weights[1], weights[0]) if flipped else (weights[0], weights[1])
    a, a_2 = (randn(rank, K, seed=i).half() for i in (5, 6))
    held = randn(M, K, seed=7).half()
    dx = held.clone()
    matmul(
        dy, w_t, x_scale=dy_scale, u=ds, v=a.T, second=Second(rows, w_t_2, v=a_2.T), out=dx,
        accumulate=True, numbers=TILE | KERNELS[kernel],
    )  # fmt: skip
    assert len(launched) == 1
    for of, w, v in ((slice(rows), w_t, a), (slice(rows, M), w_t_2, a_2)):
        expected = held[of].double() + product(dy[of], w) * dy_scale[of, None]
        expected += ds[of].double() @ v.double()
        assert relative_error(dx[of], expected) < bound(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_have_parts_too(dtype, transposed, launched):
    n, rows = 37, 21
    x = randn(M, 51, seed=1).to(dtype)
    weights = [randn(n, 51, seed=i).to(dtype) for i in (2, 3)]
    w, w_2 = [w.T.contiguous().T for w in weights] if transposed else weights
    y = matmul(x, w, second=Second(rows, w_2), numbers=TILE)
    assert len(launched) == 1
    for of, own in ((slice(rows), w), (slice(rows, M), w_2)):
        assert relative_error(y[of], product(x[of], own)) < bound(dtype)


def test_parts_that_are_not_alike_are_two_launches(launched):
    x, x_scale, rows = codes(M, K, "int8", 1), scales(M, 2), 21
    w, w_2 = codes(48, K, "int8", 3), codes(48, K + 16, "int8", 4)[:, :K]
    w_scale, bias = scales(48, 5), scales(48, 6)
    y = matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, second=Second(rows, w_2, w_scale, bias),
        out_dtype=torch.float32, numbers=TILE | KERNELS["persistent"],
    )  # fmt: skip
    assert len(launched) == 2
    expected = product(x, w) * x_scale[:, None] * w_scale
    expected[rows:] = product(x[rows:], w_2) * x_scale[rows:, None] * w_scale + bias
    assert relative_error(y, expected) < bound(torch.float32)
