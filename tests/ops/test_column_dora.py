"""DoRA by columns beside a group's wide product, against the weight formed whole, in fp64."""

import pytest
import torch
from op_cases import every_impl

from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.column_dora import ColumnDora, on_columns
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.quant import FORMATS, QuantWeight
from support import relative_error

OUTS, K, RANK, SCALE = [64, 32], 128, 3, 0.7


def leaves(dtype):
    g = torch.Generator().manual_seed(4)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = []
    for n in OUTS:
        # about the lengths that columns have, as they are where training begins
        magnitude = n**0.5 * (1 + rand(1, K) / 10)
        made.append([rand(n, K), rand(RANK, K) / 3, rand(n, RANK) / 3, magnitude])
    return [[t.to(dtype).requires_grad_(i > 0) for i, t in enumerate(own)] for own in made]


def whole(x, own):
    weight, a, b, magnitude = own
    changed = weight + SCALE * b @ a
    return x @ (changed * (magnitude / changed.detach().norm(dim=0, keepdim=True))).T


def group_of(tensors, stored=None):
    linears = []
    for weight, a, b, magnitude in tensors:
        base = weight if stored is None else QuantWeight.of(weight.detach(), FORMATS[stored])
        linears.append(on_columns(LinearParams(base, None, (ColumnDora(a, b, magnitude, SCALE),))))
    return linears


@every_impl
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("stored", [None, "int8"])
def test_values_and_gradients(impl, tokens, stored):
    tensors = leaves(torch.float32)
    linears = group_of(tensors, stored)
    exact = [[t.detach().double().requires_grad_(t.requires_grad) for t in own] for own in tensors]
    for own, linear in zip(exact, linears, strict=True):
        if stored is not None:
            own[0] = linear.weight.base.to(torch.float64)
    g = torch.Generator().manual_seed(5)
    x, dy = torch.randn(tokens, K, generator=g), torch.randn(tokens, sum(OUTS), generator=g)
    results = []
    for run, trained in (
        (lambda x: lora_linear(x, linears, impl=impl), tensors),
        (lambda x: torch.cat([whole(x, own) for own in exact], 1), exact),
    ):
        leaf = x.to(trained[0][1].dtype).requires_grad_()
        y = run(leaf)
        flat = [leaf, *(t for own in trained for t in own[1:])]
        results.append([y.detach(), *torch.autograd.grad(y, flat, dy.to(y.dtype))])
    # fp32: sums over 128 numbers, and ν as a sum of squares that cancel a little
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 5e-6


def test_the_reference_is_differentiated_by_autograd():
    tensors = leaves(torch.float64)
    linears = group_of(tensors)
    x = torch.randn(7, K, dtype=torch.float64).requires_grad_()
    dy = torch.randn(7, sum(OUTS), dtype=torch.float64)
    flat = [x, *(t for own in tensors for t in own[1:])]
    actual = torch.autograd.grad(lora_linear_ref(x, linears), flat, dy)
    expected = torch.autograd.grad(torch.cat([whole(x, own) for own in tensors], 1), flat, dy)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_it_may_be_put_on_its_weight_again():
    (linear, _) = group_of(leaves(torch.float64))
    again = on_columns(linear)
    assert again.weight.base is linear.weight.base and again.adapters == linear.adapters
    lora = LinearParams(torch.zeros(3, 2), None, (Lora(torch.zeros(1, 2), torch.zeros(3, 1), 1.0),))
    assert on_columns(lora) is lora


@every_impl
@pytest.mark.parametrize("stored", [None, "int8"])
def test_rows_of_other_linears_may_count_for_the_lengths(impl, stored):
    rows = (slice(OUTS[0]), slice(OUTS[0], sum(OUTS)))
    (first, _), g = leaves(torch.float32), torch.Generator().manual_seed(6)
    a, magnitude = first[1], first[3]
    weight = torch.randn(sum(OUTS), K, generator=g)
    b = (torch.randn(sum(OUTS), RANK, generator=g) / 3).requires_grad_()
    bases = [weight[own] for own in rows]
    if stored is not None:
        bases = [QuantWeight.of(base, FORMATS[stored]) for base in bases]
    linears = [
        on_columns(
            LinearParams(
                base,
                None,
                (
                    ColumnDora(
                        a,
                        b[own],
                        magnitude,
                        SCALE,
                        others=((bases[1 - i], b.detach()[rows[1 - i]]),),
                    ),
                ),
            )
        )
        for i, (base, own) in enumerate(zip(bases, rows, strict=True))
    ]
    exact = [torch.cat([base.to(torch.float64) for base in bases])]
    exact += [t.detach().double().requires_grad_() for t in (a, b, magnitude)]
    x, dy = torch.randn(63, K, generator=g), torch.randn(63, sum(OUTS), generator=g)
    results = []
    for run, trained in (
        (lambda x: lora_linear(x, linears, impl=impl), (a, b, magnitude)),
        (lambda x: whole(x, exact), exact[1:]),
    ):
        leaf = x.to(trained[0].dtype).requires_grad_()
        y = run(leaf)
        grads = torch.autograd.grad(y, [leaf, *trained], dy.to(y.dtype))
        results.append([y.detach(), *grads])
    # fp32, as above
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 5e-6
