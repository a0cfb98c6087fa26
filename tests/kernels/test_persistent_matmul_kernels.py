"""sm_90's persistent product on small tiles: tiles cut along K, who adds them up, where it runs."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE, product_bound, randn, widen
from test_quant_matmul_kernels import FORMATS, codes, product, scales

from fluxfast_kernels import matmul as matmul_module
from fluxfast_kernels import persistent_matmul
from fluxfast_kernels.launch import interpreted
from fluxfast_kernels.matmul import Second, matmul, product_kind
from fluxfast_kernels.quant_matmul import transpose_codes
from support import bound, relative_error

TILE = {
    **{"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 3, "num_warps": 4, "num_stages": 2},
    **{"PERSISTENT": 1, "PROGRAMS": 3, "CUT": 1},
}
# rows begin at multiples of 16 bytes, but neither rows nor columns nor K fill their last block
SHAPES = [(1, 16, 16), (17, 48, 80), (63, 80, 112), (50, 37, 160)]


@pytest.fixture(autouse=True)
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is chosen as there, and its launches leave their counters zero."""
    monkeypatch.setattr(matmul_module, "arch_key", lambda device: "sm_90")
    yield
    for table, _ in persistent_matmul._counters.values():
        assert not table.any()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("programs", "cut"), [(3, 1), (7, 1), (3, 0), (100, 1)])
def test_values_and_the_same_bits_again(fmt, m, n, k, programs, cut):
    x, w = codes(m, k, fmt, 1), codes(n, k, fmt, 2)
    x_scale, w_scale, bias = scales(m, 3), scales(n, 4), randn(n, seed=5).float()
    numbers = TILE | {"PROGRAMS": programs, "CUT": cut}
    call = {"x_scale": x_scale, "w_scale": w_scale, "bias": bias, "out_dtype": torch.float32}
    y = matmul(x, w, **call, numbers=numbers)
    expected = product(x, w) * x_scale[:, None] * w_scale + bias
    assert relative_error(y, expected) < product_bound(y.dtype, fmt)
    assert torch.equal(y, matmul(x, w, **call, numbers=numbers))
    if fmt == "int8":
        # exact sums, however they are cut; scales of 1 leave them as they are
        scale = torch.ones_like(x_scale)
        sums = matmul(x, w, x_scale=scale, out_dtype=torch.float32, numbers=numbers)
        assert torch.equal(sums, product(x, w).float())


@pytest.mark.skipif(not interpreted(), reason="a GPU runs programs in the order that it likes")
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_order_of_programs_changes_no_bit(fmt, monkeypatch):
    """Whoever comes last to a tile adds its parts up, in their own order."""
    from triton.runtime.interpreter import interpreter_builder

    m, n, k, programs = 33, 64, 400, 5
    x, w, x_scale = codes(m, k, fmt, 1), codes(n, k, fmt, 2), scales(m, 3)
    numbers = TILE | {"PROGRAMS": programs}
    in_order = matmul(x, w, x_scale=x_scale, out_dtype=torch.float32, numbers=numbers)
    set_place = interpreter_builder.set_grid_idx
    came = []

    def backwards(i, *others):
        came.append(programs - 1 - i)
        set_place(programs - 1 - i, *others)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    again = matmul(x, w, x_scale=x_scale, out_dtype=torch.float32, numbers=numbers)
    assert came == [4, 3, 2, 1, 0] and torch.equal(in_order, again)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("cut", [0, 1])
def test_dgrad_on_a_transposed_copy_adds_to_a_slice(fmt, cut):
    m, n, k, rank = 35, 96, 80, 5
    dy, w, dy_scale = codes(m, n, fmt, 1), codes(n, k, fmt, 2), scales(m, 3)
    ds, a = widen(randn(m, rank, seed=4).half(), 3, 2), randn(rank, k, seed=5).half()
    held = randn(m, k, seed=6).half()
    dx, w_t = widen(held), transpose_codes(w).T
    assert product_kind(dy, w.T, None, dx.dtype) == f"{fmt}_t"
    assert product_kind(dy, w_t.T.contiguous(), None, dx.dtype) == f"{fmt}_persistent"
    numbers = TILE | {"CUT": cut}
    matmul(dy, transpose_codes(w), x_scale=dy_scale, u=ds, v=a.T, out=dx, accumulate=True,
           numbers=numbers)  # fmt: skip
    expected = held.double() + dy.double() @ w.double() * dy_scale[:, None]
    expected += ds.double() @ a.double()
    assert relative_error(dx, expected) < product_bound(dx.dtype, fmt)
    assert dx._base[:, :16].isnan().all() and dx._base[:, 16 + k :].isnan().all()


def test_integer_sums_are_exact_across_a_cut():
    m, n, k = 3, 32, 1120
    x, w = codes(m, k, "int8", 1), codes(n, k, "int8", 2)
    x[0], w[0], w[1] = 127, 127, -127
    one = torch.ones(max(m, n), device=DEVICE)
    call = {"x_scale": one[:m], "w_scale": one[:n], "out_dtype": torch.float32}
    y = matmul(x, w, **call, numbers=TILE)
    assert torch.equal(y, product(x, w).float())
    assert float(y.abs().max()) == 127 * 127 * k > 2**24


def test_what_a_descriptor_can_not_describe_goes_to_the_other_kernel():
    x, w = codes(17, 96, "int8", 1), codes(48, 96, "int8", 2)
    kind = product_kind(x, w, None, torch.float32)
    assert kind == "int8_persistent"

    def other(x, w, second=None, dtype=torch.float32):
        return product_kind(x, w, second, dtype)

    wide_x, wide_w = codes(17, 113, "int8", 3), codes(48, 113, "int8", 4)
    # rows 113 bytes apart; a first column that is not aligned; float rows; an odd second weight
    assert other(wide_x[:, :96], w) == other(x, wide_w[:, :96]) == "int8"
    aligned = codes(17, 128, "int8", 5)
    assert other(aligned[:, 1:97], w) == "int8" and other(aligned[:, 16:112], w) == kind
    assert other(x.half(), w, dtype=torch.float16) == "half"
    assert other(x, w, Second(3, wide_w[:, :96])) == "int8"
    assert other(x, w, Second(3, w)) == "int8" and other(x, w, Second(3, w.clone())) == kind
    # and is computed right there, without its numbers for this one
    x_scale = scales(17, 6)
    y = matmul(wide_x[:, :96], w, x_scale=x_scale, out_dtype=torch.float32, numbers=TILE)
    expected = product(wide_x[:, :96], w) * x_scale[:, None]
    assert relative_error(y, expected) < bound(torch.float32)


def test_an_empty_product_and_an_empty_sum():
    x, w = codes(4, 32, "int8", 1), codes(16, 32, "int8", 3)
    call = {"out_dtype": torch.float32, "numbers": TILE}
    assert matmul(x[:0], w, x_scale=scales(4, 2)[:0], **call).shape == (0, 16)
    y = matmul(x[:, :0], w[:, :0], x_scale=scales(4, 2), bias=scales(16, 4), **call)
    assert torch.equal(y, scales(16, 4).expand(4, 16))


def test_the_users_allocator_stays(monkeypatch):
    import triton
    from triton.runtime import _allocation

    def users(size, alignment, stream):
        raise AssertionError

    before = _allocation._allocator.get()
    try:
        triton.set_allocator(users)
        persistent_matmul.provide_scratch()
        assert _allocation._allocator.get() is users
        triton.set_allocator(_allocation.NullAllocator())
        persistent_matmul.provide_scratch()
        assert _allocation._allocator.get() is persistent_matmul._scratch
    finally:
        triton.set_allocator(before)
