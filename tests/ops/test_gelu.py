import math

import pytest
import torch
from op_checks import (
    assert_matches_fp64,
    assert_same_for_any_thread_count,
    outputs_and_grads,
    randn,
    saved_shapes,
)

from fluxfast.ops.gelu import gelu, gelu_ref


def native(x):
    return gelu(x, impl="native")


def formula(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("shape", [(2, 63, 1000), (3, 17, 63), (1,), (), (20000,), (5, 7)])
def test_native_matches_fp64(isa, poisoned, shape):
    assert_matches_fp64(native, gelu_ref, [randn(*shape).detach().mul(3).requires_grad_()])


def test_ref_is_the_formula():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gelu_ref(x), formula(x))
    assert torch.autograd.gradcheck(gelu_ref, [x[::50].detach().requires_grad_()])


def test_every_value_is_near(isa):
    """Element by element: tanh's own form loses all digits left of -5, x·sigmoid(2u) doesn't."""
    x = torch.linspace(-8, 8, 4001, requires_grad=True)
    double = x.detach().double().requires_grad_()
    u = math.sqrt(2 / math.pi) * (double + 0.044715 * double**3)
    expected = double * torch.sigmoid(2 * u)
    y = native(x)
    y.sum().backward()
    expected.sum().backward()
    # the exponent 2u reaches 50 there, and its rounding is the result's relative error: 50 · 2^-24
    # · a few
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    # the derivative crosses zero near -0.75
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-5, atol=3e-7)


def test_extremes(isa):
    x = torch.tensor(
        [1e-30, -1e-30, 0.0, 12.0, 1e30, math.inf, -12.0, -1e30, -math.inf, math.nan],
        requires_grad=True,
    )
    y = native(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = torch.tensor([5e-31, -5e-31, 0.0, 12.0, 1e30, math.inf, 0.0, 0.0, 0.0, math.nan])
    torch.testing.assert_close(y.detach(), expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    expected_dx = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, math.nan])
    torch.testing.assert_close(dx, expected_dx, equal_nan=True, rtol=1e-6, atol=1e-34)


def test_strided_input_and_gradient(isa, poisoned):
    """The MLP's columns of a packed projection, read in place; a transposed tensor, which must be
    copied.
    """

    def columns(fn):
        return lambda packed: fn(packed[..., 24:]).expand(2, 2, 9, 40)

    def transposed(fn):
        return lambda x: fn(x.transpose(1, 2)).transpose(1, 2)

    assert_matches_fp64(columns(native), columns(gelu_ref), [randn(2, 9, 64)])
    assert_matches_fp64(transposed(native), transposed(gelu_ref), [randn(2, 9, 64)])


@pytest.mark.parametrize("shape", [(2, 0, 16), (0,), (3, 0)])
def test_no_elements(isa, shape):
    (out,), (dx,) = outputs_and_grads(native, [randn(*shape)])
    assert out.shape == dx.shape == shape


def test_same_for_any_thread_count(isa):
    assert_same_for_any_thread_count(native, [randn(3, 100, 333)])


def test_keeps_x_only(isa):
    x = randn(2, 9, 16)
    assert saved_shapes(lambda: native(x)) == [(2, 9, 16)]
