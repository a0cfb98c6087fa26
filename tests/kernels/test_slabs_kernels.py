"""Sums that are cut: the last program adds them, whatever the order of programs."""

import pytest
import torch
from kernel_cases import DEVICE, product_error, programs_backwards, randn

from fluxfast_kernels import slabs
from fluxfast_kernels.launch import interpreted
from fluxfast_kernels.lora_linear import SecondDown, SecondOuter, lora_down, lora_outer
from fluxfast_kernels.product_tile import make_segments
from support import bound

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


def narrow_products():
    """s, dS of unequal segments, dB and dA of two parts; the sum of each is cut."""
    m, k, n = 140, 80, 112
    x, a, dy = (randn(*size, seed=i).float() for i, size in enumerate([(m, k), (5, k), (m, n)]))
    b, s = randn(n, 3, seed=4).float(), torch.empty(m, 5, device=DEVICE)
    segments = make_segments((32, 80), (3, 2), DEVICE)
    lora_down(x, a, s, second=SecondDown(63, 2 * a), numbers=SMALL)
    ds = lora_down(dy, b.T, torch.empty_like(s), segments=segments, numbers=SMALL)
    db, db_2 = (torch.empty(n, 3, device=DEVICE) for _ in range(2))
    lora_outer(dy, s, db, segments=segments, second=SecondOuter(63, db_2), numbers=SMALL)
    da = lora_outer(x, ds, torch.empty_like(a), transposed=True, numbers=SMALL)
    return x, a, dy, b, s, ds, db, db_2, da


def test_cut_sums_beside_fp64():
    x, a, dy, b, s, ds, db, db_2, da = narrow_products()
    error = bound(torch.float32)
    assert product_error(s[:63], x[:63], a.T) < error
    assert product_error(s[63:], x[63:], 2 * a.T) < error
    for cols, ranks in ((slice(0, 32), slice(0, 3)), (slice(32, 112), slice(3, 5))):
        r = ranks.stop - ranks.start
        assert product_error(ds[:, ranks], dy[:, cols], b[cols, :r]) < error
        assert product_error(db[cols, :r], dy[:63, cols].T, s[:63, ranks]) < error
        assert product_error(db_2[cols, :r], dy[63:, cols].T, s[63:, ranks]) < error
        assert not db[cols, r:].any() and not db_2[cols, r:].any()
    assert product_error(da, ds.T, x) < error


@pytest.mark.skipif(not interpreted(), reason="a GPU runs programs in an order of its own")
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    cut = []
    monkeypatch.setattr(
        "fluxfast_kernels.lora_linear.workspace",
        lambda *args: cut.append(slabs.workspace(*args)) or cut[-1],
    )
    forwards = narrow_products()
    with programs_backwards():
        backwards = narrow_products()
    # four products, twice
    assert len(cut) == 8 and all(made is not None for made, _ in cut)
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))
    assert not slabs.semaphores(1, forwards[0].device).any()


def test_a_split_is_never_short_and_all_fill_the_device():
    device = torch.device(DEVICE)
    full = slabs.full_programs(device)
    for length, block, programs in [(0, 16, 1), (1, 16, 1), (3072, 64, 24), (10**6, 32, 3)]:
        splits, one = slabs.split(length, block, programs, device)
        assert splits >= 1 and (splits - 1) * one < max(length, 1) <= splits * one
        assert one >= 4 * block and splits * programs <= 1.5 * full
    assert slabs.split(10**6, 32, full, device)[0] == 1


def test_a_graph_is_not_captured_before_there_are_semaphores(monkeypatch):
    device = torch.device("cuda", 3)
    monkeypatch.setattr(slabs, "_semaphores", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before it is captured"):
        slabs.semaphores(1, device)


def test_launches_that_a_graph_captures_have_semaphores_of_their_own(monkeypatch):
    made = {}
    device = torch.device("cuda", 3)
    monkeypatch.setattr(slabs, "_semaphores", made)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    eager = slabs.semaphores(1, device)
    assert slabs.semaphores(1, device) is eager
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert slabs.semaphores(1, device) is not eager and len(made) == 2
