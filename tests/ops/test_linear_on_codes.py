"""`lora_linear` over a weight that is stored as 8-bit codes, in 8-bit arithmetic: forward and dgrad
beside the formula in fp64, on every implementation.
"""

import pytest
import torch
from lora_cases import TOLERANCES, coded_weight, decoded, device_of
from op_cases import every_impl

from fluxfast.ops import dispatch
from fluxfast.ops.linear import products_torch
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import Quantized, RowOutput, row_quant_ref
from support import product_tolerance, relative_error

every_fmt = pytest.mark.parametrize("fmt", ["int8", "e4m3"])


def operands(impl, fmt, m, n, k, dtype=torch.float32):
    """x, W's codes, the linear over them, and dy."""
    g = torch.Generator().manual_seed(m + n + k)
    x, w, bias, dy = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,), (m, n)))
    if m > 2:
        # a row of zeros, and one whose largest element is far above the rest
        x[1], dy[2] = 0, 0
        x[2, 0] = 1e4
    device = device_of(impl)
    codes = Quantized(*(t.to(device) for t in row_quant_ref(w, fmt)))
    linear = LinearParams(coded_weight(codes, fmt), bias.to(device, dtype))
    return x.to(device, dtype).requires_grad_(), codes, linear, dy.to(device, dtype)


def on_rows_of_codes(x, linear, impl, fmt):
    """y of rows that somebody else has quantised."""
    group = LinearGroup([linear], x.dtype, compute=fmt, impl=impl)
    return group.forward(RowOutput(None, *row_quant_ref(x.detach(), fmt)))[0]


@every_impl
@every_fmt
@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 40), (5, 63, 51), (9, 16, 1), (0, 16, 8)])
def test_forward_and_dgrad(impl, fmt, m, n, k):
    """The gradient is that of the product as if x had not been rounded."""
    x, weight, linear, dy = operands(impl, fmt, m, n, k)
    y = lora_linear(x, [linear], impl, compute=fmt)
    (dx,) = torch.autograd.grad(y, x, dy)
    rows = decoded(row_quant_ref(x.detach(), fmt))
    tolerance = product_tolerance(TOLERANCES[x.dtype], fmt, x.device)
    assert relative_error(y, rows @ decoded(weight).T + linear.bias.double()) < tolerance
    folded = decoded(row_quant_ref(dy, fmt, weight.scale))
    assert relative_error(dx, folded @ weight.q.double()) < tolerance
    coded = on_rows_of_codes(x, linear, impl, fmt)
    assert not coded.requires_grad and relative_error(coded, y) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_fmt
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_sixteen_bits(impl, dtype, fmt):
    x, weight, linear, dy = operands(impl, fmt, 5, 32, 40, dtype)
    y = lora_linear(x, [linear], impl, compute=fmt)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    rows = decoded(row_quant_ref(x.detach(), fmt))
    expected = rows @ decoded(weight).T + linear.bias.double()
    tolerance = product_tolerance(TOLERANCES[dtype], fmt, x.device)
    assert relative_error(y, expected) < tolerance
    folded = decoded(row_quant_ref(dy, fmt, weight.scale))
    assert relative_error(dx, folded @ weight.q.double()) < tolerance
    coded = on_rows_of_codes(x, linear, impl, fmt)
    assert coded.dtype == dtype and relative_error(coded, expected) < tolerance


def test_what_it_refuses():
    x, _, linear, _ = operands("ref", "int8", 3, 16, 8)
    with pytest.raises(ValueError, match="compute: expected one of"):
        lora_linear(x, [linear], compute="int4")
    with pytest.raises(ValueError, match=r"expected weight \[out, 7\]"):
        lora_linear(x[:, :7], [linear], compute="int8")
    with pytest.raises(ValueError, match="impl='native' can't do this call"):
        lora_linear(x.double(), [linear], "native", compute="int8")


def overflowing(a, b):
    """What oneDNN computes without VNNI: b's products with a + 128, summed in pairs in 16 bits, and
    then corrected.
    """
    shifted, b = a.int() + 128, b.int()
    if a.shape[1] % 2:
        shifted, b = (
            torch.nn.functional.pad(shifted, (0, 1)),
            torch.nn.functional.pad(b, (0, 0, 0, 1)),
        )
    pairs = shifted[:, 0::2, None] * b[0::2] + shifted[:, 1::2, None] * b[1::2]
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.sum(0)).int()


def test_a_cpu_whose_int8_products_overflow(monkeypatch):
    """It is found out, and the products are computed in float32."""
    products_torch._try_int8_products.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", overflowing)
    try:
        assert not products_torch.int8_products_are_exact()
        test_forward_and_dgrad("native" if dispatch.HAS_NATIVE else "auto", "int8", 5, 63, 51)
    finally:
        products_torch._try_int8_products.cache_clear()
