"""`row_quant`: the codes are the formula's, whatever the row holds and wherever it lies."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, quantize_rows, randn, widen

from fluxfast_kernels.row_quant import row_quant
from support import code_distance


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 128), (63, 96), (5, 1), (3, 1000), (0, 32)])
@pytest.mark.parametrize("col_scaled", [False, True])
def test_codes_are_the_formulas(fmt, dtype, rows, cols, col_scaled):
    x = randn(rows, cols, seed=1).to(dtype)
    col_scale = randn(cols, seed=2, scale=0.01).float() if col_scaled else None
    q, scale = row_quant(x, fmt, col_scale=col_scale)
    expected, expected_scale = quantize_rows(
        x.float() if col_scale is None else x.float() * col_scale, fmt
    )
    assert q.dtype == expected.dtype and q.shape == x.shape and torch.equal(scale, expected_scale)
    assert code_distance(q, expected) == 0


@pytest.mark.parametrize(("fmt", "top"), [("int8", 127), ("e4m3", 448)])
def test_rows_that_are_hard(fmt, top):
    x = randn(7, 64, seed=3).float()
    x[0] = 0
    x[1] = 1e-44
    x[2, 5] = 3e4
    x[3, 7] = -float("inf")
    x[4, 63] = float("nan")
    x[5] = torch.arange(64, device=DEVICE) * 0.5
    q, scale = row_quant(widen(x), fmt)
    assert scale[0] == 1 and scale[1] == 1 and not q[:2].float().any()
    assert q[2, 5].float() == top and scale[2] == torch.tensor(3e4) / top
    assert scale[3].isinf() and scale[4].isnan()
    clean = [0, 1, 2, 5, 6]
    expected, expected_scale = quantize_rows(x[clean], fmt)
    assert torch.equal(scale[clean], expected_scale) and code_distance(q[clean], expected) == 0


def test_halves_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=DEVICE)
    q, scale = row_quant(x, "int8")
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_refusals():
    with pytest.raises(ValueError, match="int4"):
        row_quant(torch.zeros(2, 4, device=DEVICE), "int4")
    with pytest.raises(ValueError, match="contiguous last dimension"):
        row_quant(torch.zeros(4, 2, device=DEVICE).T, "int8")
