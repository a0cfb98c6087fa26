"""The adapters' kernels on two parts of rows in one launch, beside fp64 and each part alone."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, product_error, randn

from fluxfast.ops.linear import products_triton
from fluxfast.ops.linear.products_triton import SecondLoras
from fluxfast_kernels.lora_grads import SecondGrads, lora_grads
from fluxfast_kernels.lora_linear import SecondDown, SecondOuter, lora_down, lora_outer
from support import bound, relative_error

# widths and ranks of a group: segments with odd ranks and one without a LoRA, and a lone linear
# whose width no segment could have
GROUPS = [((48, 16, 80), ((3,), (), (2, 5))), ((37,), ((1,),)), ((64, 96), ((16,), (16,)))]
# rows of the first part and of the second: none, one, and more than a block
ROWS = [(1, 63), (63, 1), (0, 17), (17, 0), (70, 130)]


def loras(outs, ranks, k, seed, dtype):
    """A, B and the scale of each LoRA."""
    a, b, scales = [], [], []
    for n, own in zip(outs, ranks, strict=True):
        for r in own:
            a.append(randn(r, k, seed=seed, scale=k**-0.5).to(dtype))
            b.append(randn(n, r, seed=seed + 1).to(dtype))
            scales.append(0.25 * (1 + seed % 3))
            seed += 2
    return a, b, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", GROUPS)
def test_two_parts_beside_fp64(group, rows, dtype):
    (outs, ranks), k, m, first = group, 40, sum(rows), rows[0]
    counts = [len(own) for own in ranks]
    x, dy = randn(m, k, seed=1).to(dtype), randn(m, sum(outs), seed=2).to(dtype)
    parts = [loras(outs, ranks, k, seed, dtype) for seed in (10, 41)]
    (a, b, scales), (a_2, b_2, scales_2) = parts
    s = products_triton.down(x, None, a, scales, dtype, second=SecondLoras(first, a_2, scales_2))
    ds, db = products_triton.lora_grads(
        dy, s, b, scales, counts, list(outs), torch.float32,
        second=SecondLoras(first, b_2, scales_2),
    )  # fmt: skip
    da = products_triton.grad_a(ds, x, None, torch.float32, second_row=first)

    # dB is of the s and dA of the dS that the kernels wrote, so that each error is one kernel's
    for i, own_rows in enumerate((slice(0, first), slice(first, m))):
        x_i, dy_i, s_i, ds_i = (t[own_rows].double() for t in (x, dy, s, ds))
        a_i, b_i, scales_i = parts[i]
        of_rank = torch.cat(
            [torch.full((len(t),), c, device=DEVICE) for t, c in zip(a_i, scales_i, strict=True)]
        )
        scaled = torch.cat(a_i).double().T * of_rank
        assert product_error(s_i, x_i, scaled) < bound(dtype)
        col = rank = lora = 0
        for n, own in zip(outs, ranks, strict=True):
            grads = db[i, col : col + n]
            for r in own:
                scaled = b_i[lora].double() * scales_i[lora]
                error = product_error(ds_i[:, rank : rank + r], dy_i[:, col : col + n], scaled)
                assert error < bound(dtype)
                rank, lora = rank + r, lora + 1
            s_own = s_i[:, rank - sum(own) : rank]
            error = product_error(grads[:, : sum(own)], dy_i[:, col : col + n].T, s_own)
            assert error < bound(torch.float32)
            assert not grads[:, sum(own) :].any()
            col += n
        assert product_error(da[i], ds_i.T, x_i) < bound(torch.float32)


def test_only_one_part_has_scales():
    x, a, dtype = randn(5, 32, seed=1).float(), [randn(3, 32, seed=2).float()], torch.float32
    s = products_triton.down(x, None, a, [1.0], dtype, second=SecondLoras(2, a, [0.5]))
    expected = x.double() @ a[0].double().T
    expected[2:] *= 0.5
    assert relative_error(s, expected) < bound(dtype)


def test_parts_that_do_not_fit():
    x, v, s = (torch.zeros(shape, device=DEVICE) for shape in [(4, 32), (3, 32), (4, 3)])
    g, db = torch.zeros(3, 32, device=DEVICE), torch.zeros(32, 3, device=DEVICE)
    with pytest.raises(ValueError, match="cannot begin at row 5 of 4"):
        lora_down(x, v, s, second=SecondDown(5, v))
    with pytest.raises(ValueError, match="one dtype, shape and strides"):
        lora_down(x, v, s, second=SecondDown(2, v.half()))
    with pytest.raises(ValueError, match="one dtype, shape and strides"):
        lora_down(x, v, s, scale=torch.ones(3, device=DEVICE), second=SecondDown(2, v))
    with pytest.raises(ValueError, match="one dtype, shape and strides"):
        lora_outer(x, s, g, transposed=True, second=SecondOuter(2, g[:, ::2]))
    with pytest.raises(ValueError, match="one dtype, shape and strides"):
        lora_grads(x, s, db, s, db, second=SecondGrads(2, db.T.contiguous().T, db))
