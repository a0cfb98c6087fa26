"""A part of an adapter's rows, against the same rows of all that the adapter adds, in fp64."""

import pytest
import torch
from op_cases import every_impl

from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.row_part import RowPart
from support import relative_error

# the rows before, of each of two linears, and after
BEFORE, OUTS, AFTER, K = 7, (32, 16), 9, 24


def tensors_in(dtype):
    g = torch.Generator().manual_seed(3)
    shapes = (sum(OUTS), K), (4, 3), (16, 8)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(i > 0)
        for i, shape in enumerate(shapes)
    ]


@every_impl
@pytest.mark.parametrize("tokens", [1, 63])
def test_values_and_gradients(impl, tokens):
    weight, w1, w2 = tensors_in(torch.float32)
    shared, starts = Lokr((w1,), (w2,), 0.7), (0, OUTS[0])
    assert BEFORE + sum(OUTS) + AFTER == w1.shape[0] * w2.shape[0]
    linears = [
        LinearParams(weight[start : start + n], None, (RowPart(shared, BEFORE + start, 64),))
        for start, n in zip(starts, OUTS, strict=True)
    ]
    g = torch.Generator().manual_seed(5)
    x, dy = torch.randn(tokens, K, generator=g), torch.randn(tokens, sum(OUTS), generator=g)
    exact_weight, *exact = tensors_in(torch.float64)
    added = torch.kron(*exact)[BEFORE : BEFORE + sum(OUTS)] * 0.7
    results = []
    for run, trained in (
        (lambda x: lora_linear(x, linears, impl=impl), [w1, w2]),
        (lambda x: lora_linear_ref(x, linears), [w1, w2]),
        (lambda x: x @ (exact_weight + added).T, exact),
    ):
        leaf = x.to(trained[0].dtype).requires_grad_()
        y = run(leaf)
        grads = torch.autograd.grad(y, [leaf, *trained], dy.to(y.dtype))
        results.append([y.detach(), *grads])
    for actual, plain, expected in zip(*results, strict=True):
        # fp32: sums over 63 rows and 24 columns
        assert relative_error(actual, expected) < 2e-6
        assert relative_error(plain, expected) < 2e-6
