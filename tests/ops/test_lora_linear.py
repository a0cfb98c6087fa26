"""`lora_linear` beside its reference in fp64: values, dx, every dA and dB; packed groups, odd ranks, mixed storage."""

import pytest
import torch

from fluxfast.ops.lora_linear import Adapter, LinearParams, lora_linear, lora_linear_ref
from support import relative_error


def make(n_in, outs, ranks, *, dtype=torch.float64, store=None, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(store or dtype)

    linears = []
    for n_out, adapter_ranks in zip(outs, ranks, strict=True):
        adapters = tuple(
            Adapter(rand(r, n_in, scale=n_in**-0.5).requires_grad_(), rand(n_out, r, scale=0.5).requires_grad_(), 0.3 + i)
            for i, r in enumerate(adapter_ranks)
        )
        linears.append(LinearParams(rand(n_out, n_in, scale=n_in**-0.5), rand(n_out) if bias else None, adapters))
    return linears


def leaves(linears):
    return [t for p in linears for adapter in p.adapters for t in (adapter.a, adapter.b)]


CASES = [
    (1, 63, [17], [[1]]),
    (63, 32, [32, 32, 32], [[5], [5], [5]]),
    (1000, 24, [8, 40], [[3, 16], []]),
    (0, 8, [8], [[2]]),
    (7, 63, [31, 5], [[], []]),
]


@pytest.mark.parametrize(("tokens", "n_in", "outs", "ranks"), CASES)
@pytest.mark.parametrize("bias", [True, False])
# fp64: the order of summation only; fp32: the same at 2^-24 over at most 1000 terms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_reference(tokens, n_in, outs, ranks, bias, dtype, tolerance):
    linears = make(n_in, outs, ranks, bias=bias, dtype=dtype)
    exact = [
        LinearParams(
            p.weight.double(),
            None if p.bias is None else p.bias.double(),
            tuple(Adapter(*(t.detach().double().requires_grad_() for t in (a.a, a.b)), a.scale) for a in p.adapters),
        )
        for p in linears
    ]
    x = torch.randn(2, tokens, n_in, dtype=torch.float64)
    x_test, x_ref = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    y, y_ref = lora_linear(x_test, linears), lora_linear_ref(x_ref, exact)
    assert y.shape == (2, tokens, sum(outs)) and relative_error(y, y_ref) < tolerance
    dy = torch.randn(y.shape, dtype=torch.float64)
    grads = torch.autograd.grad(y, [x_test, *leaves(linears)], dy.to(dtype))
    expected = torch.autograd.grad(y_ref, [x_ref, *leaves(exact)], dy.to(dtype).double())
    for grad, reference in zip(grads, expected, strict=True):
        assert relative_error(grad, reference) < tolerance


def test_gradcheck():
    linears = make(6, [5, 4], [[2], [1, 3]])
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear(x, linears), (x, *leaves(linears)))


def test_mixed_storage_keeps_gradients_in_the_storage_dtype():
    linears = make(32, [48], [[4]], store=torch.bfloat16)
    x = torch.randn(9, 32, requires_grad=True)
    y = lora_linear(x, linears)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.float32
    a = linears[0].adapters[0]
    upcast = [LinearParams(linears[0].weight.float(), linears[0].bias.float(), (Adapter(a.a.float(), a.b.float(), a.scale),))]
    # the storage type decides what the weights are; the arithmetic is fp32
    assert relative_error(y, lora_linear_ref(x, upcast)) < 2e-6
    assert a.a.grad.dtype == torch.bfloat16 and a.a.grad.abs().sum() > 0


def test_non_contiguous_input_and_no_input_gradient():
    linears = make(10, [6], [[2]])
    x = torch.randn(10, 4, 3, dtype=torch.float64).permute(1, 2, 0)
    y = lora_linear(x, linears)
    assert relative_error(y, lora_linear_ref(x, linears)) < 1e-12
    assert all(g is not None for g in torch.autograd.grad(y.sum(), leaves(linears)))


def test_keeps_no_weight_for_backward():
    """Backward must not keep the base, let alone a compute-dtype copy of it: that would be a second model."""
    linears = make(64, [64], [[2]], store=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(torch.randn(3, 64, requires_grad=True), linears)
    assert sorted(tuple(t.shape) for t in saved) == [(2, 64), (3, 2), (3, 64), (64, 2)]


def test_base_that_wants_a_gradient_is_refused():
    linears = make(4, [4], [[1]])
    linears[0].weight.requires_grad_()
    with pytest.raises(ValueError, match="base weight or bias requires a gradient"):
        lora_linear(torch.randn(2, 4, dtype=torch.float64), linears)
