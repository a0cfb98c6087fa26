"""`quant_matmul` beside its formula in fp64, forward and dgrad, on every implementation."""

import pytest
import torch
from lora_cases import TOLERANCES, decoded, device_of
from op_cases import every_impl

from fluxfast.ops import dispatch
from fluxfast.ops.linear import products_torch
from fluxfast.ops.quant_matmul import quant_matmul, quant_matmul_ref
from fluxfast.ops.row_quant import Quantized, row_quant_ref
from support import relative_error

every_fmt = pytest.mark.parametrize("fmt", ["int8", "e4m3"])


def operands(impl, fmt, m, n, k, dtype=torch.float32):
    g = torch.Generator().manual_seed(m + n + k)
    x, w, bias, dy = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,), (m, n)))
    if m > 2:
        # a row of zeros, and one whose largest element is far above the rest
        x[1], dy[2] = 0, 0
        x[2, 0] = 1e4
    device = device_of(impl)
    weight = row_quant_ref(w, fmt)
    weight = Quantized(*(t.to(device) for t in weight))
    return (
        x.to(device, dtype).requires_grad_(),
        weight,
        bias.to(device, dtype),
        dy.to(device, dtype),
    )


@every_impl
@every_fmt
@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 40), (5, 63, 51), (9, 16, 1), (0, 16, 8)])
def test_forward_and_dgrad(impl, fmt, m, n, k):
    x, weight, bias, dy = operands(impl, fmt, m, n, k)
    y = quant_matmul(x, *weight, bias, impl, fmt=fmt)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert (
        relative_error(
            y, decoded(row_quant_ref(x.detach(), fmt)) @ decoded(weight).T + bias.double()
        )
        < 2e-6
    )
    assert (
        relative_error(dx, decoded(row_quant_ref(dy, fmt, weight.scale)) @ weight.q.double()) < 2e-6
    )
    coded = quant_matmul(row_quant_ref(x.detach(), fmt), *weight, bias, impl, fmt=fmt)
    assert not coded.requires_grad and relative_error(coded, y) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_fmt
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_sixteen_bits(impl, dtype, fmt):
    x, weight, bias, dy = operands(impl, fmt, 5, 32, 40, dtype)
    y = quant_matmul(x, *weight, bias, impl, fmt=fmt)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    expected = decoded(row_quant_ref(x.detach(), fmt)) @ decoded(weight).T + bias.double()
    assert relative_error(y, expected) < TOLERANCES[dtype]
    assert (
        relative_error(dx, decoded(row_quant_ref(dy, fmt, weight.scale)) @ weight.q.double())
        < TOLERANCES[dtype]
    )
    coded = quant_matmul(
        row_quant_ref(x.detach(), fmt), *weight, bias, impl, fmt=fmt, out_dtype=dtype
    )
    assert coded.dtype == dtype and relative_error(coded, expected) < TOLERANCES[dtype]


@every_fmt
def test_reference(fmt):
    """Its values are those of rounded rows, its gradient that of the product as if they had not
    been rounded.
    """
    x, weight, bias, dy = operands("ref", fmt, 5, 17, 40)
    y = quant_matmul_ref(x, *weight, bias, fmt=fmt)
    assert relative_error(y, quant_matmul(x, *weight, bias, "ref", fmt=fmt)) < 2e-6
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative_error(dx, dy.double() @ decoded(weight)) < 2e-6
    assert (
        relative_error(quant_matmul_ref(row_quant_ref(x.detach(), fmt), *weight, bias, fmt=fmt), y)
        < 2e-6
    )


def test_what_it_refuses():
    x, weight, bias, _ = operands("ref", "int8", 3, 16, 8)
    with pytest.raises(ValueError, match="the format is one of"):
        quant_matmul(x, *weight, bias, fmt="int4")
    with pytest.raises(ValueError, match=r"codes of 'e4m3' are torch.float8_e4m3fn"):
        quant_matmul(x, *weight, bias, fmt="e4m3")
    with pytest.raises(ValueError, match=r"expected x \[..., K\]"):
        quant_matmul(x[:, :7], *weight, bias)
    with pytest.raises(ValueError, match="out_dtype is for an x of codes"):
        quant_matmul(x, *weight, bias, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="impl='native' can't do this call"):
        quant_matmul(x.double(), *weight, bias, "native")


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
