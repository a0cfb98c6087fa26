"""Adapters of any kind beside the LoRAs that a group fuses: values and every gradient against plain
torch in fp64.
"""

import pytest
import torch
from lora_cases import TOLERANCES, as_codes, decoded, device_of, make_group, weight_codes
from op_cases import every_impl, needs_native, needs_triton

from fluxfast.ops.linear.adapters import Lora, over_tensors, tensors_of
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight
from support import product_tolerance, relative_error
from toy_adapters import Diagonal, Shift

OUTS, K = [32, 16, 48], 40


def with_others(linears, dropout=0.0):
    """The same linears with adapters of other kinds before, after and in place of their LoRAs."""
    g = torch.Generator().manual_seed(11)
    like = linears[0].adapters[0].a

    def rand(*shape):
        made = torch.randn(*shape, generator=g, dtype=torch.float64)
        return made.to(like.device, like.dtype).requires_grad_()

    shift = [Shift(rand(n), dropout) for n in OUTS]
    diagonal = [Diagonal(rand(K), rand(n, K), dropout) for n in OUTS]
    (first, second, third), plain = (p.adapters for p in linears), linears
    adapters = ((shift[0], *first), (*second, diagonal[1]), (shift[2], *third, diagonal[2]))
    return [p._replace(adapters=own) for p, own in zip(plain, adapters, strict=True)]


def stored_as(linears, stored):
    """The same linears over a base in floats, in a format, or in something that only decodes."""
    if stored in ("int8", "none"):
        return as_codes(linears, stored if stored == "int8" else None, True)
    if stored == "float":
        return linears
    return [p._replace(weight=QuantWeight.of(p.weight, FORMATS[stored])) for p in linears]


def terms(adapter, x):
    """What an adapter adds to y, from leaves in fp64."""
    t = [t.double() for t in adapter.tensors]
    if isinstance(adapter, Lora):
        return adapter.scale * (x @ t[0].T) @ t[1].T
    return t[0] if isinstance(adapter, Shift) else (x * t[0]) @ t[1].T


def wanted(x, dy, linears, compute, mask):
    """y and the gradients of x and of all adapters' tensors, by autograd in fp64."""
    x = x.detach().double().requires_grad_()
    leaves = [
        [t.detach().double().requires_grad_() for t in tensors_of(p.adapters)] for p in linears
    ]
    seen, weights = x, [p.weight.to(torch.float64) for p in linears]
    if compute != "same":
        rounded = decoded(row_quant_ref(x.detach().float(), compute))
        # the rounded rows, with the gradient of x itself; that of the wide products is added below
        seen = x + (rounded - x).detach()
        weights = [decoded(weight_codes(p, compute)) for p in linears]
    ys = []
    for p, w, own in zip(linears, weights, leaves, strict=True):
        wide = seen if compute == "same" else seen.detach()
        y = wide @ w.T + (0 if p.bias is None else p.bias.double())
        for adapter in over_tensors(p.adapters, iter(own)):
            # LoRAs without a dropout read the codes; every other kind reads values
            reads = x if not isinstance(adapter, Lora) or adapter.dropout else seen
            y = y + terms(adapter, reads * mask if adapter.dropout else reads)
        ys.append(y)
    y = torch.cat(ys, dim=1)
    flat = [x, *(t for own in leaves for t in own)]
    dx, *grads = torch.autograd.grad(y, flat, dy.double())
    if compute != "same":
        codes = [weight_codes(p, compute) for p in linears]
        folded = row_quant_ref(dy, compute, torch.cat([c.scale for c in codes]))
        dx = dx + decoded(folded) @ torch.cat([c.q.double() for c in codes])
    return [y, dx, *grads]


def actual(x, dy, linears, impl, **options):
    x = x.detach().requires_grad_()
    y = lora_linear(x, linears, impl, **options)
    leaves = [t for p in linears for t in tensors_of(p.adapters)]
    return [y, *torch.autograd.grad(y, [x, *leaves], dy)]


def operands(device, dtype, tokens=9):
    g = torch.Generator().manual_seed(7)
    x, dy = (torch.randn(tokens, n, generator=g, dtype=torch.float64) for n in (K, sum(OUTS)))
    return x.to(device, dtype), dy.to(device, dtype)


@pytest.mark.parametrize(
    ("impl", "tokens"),
    [
        ("ref", 9),
        pytest.param("native", 9, marks=needs_native),
        # more tokens than columns: the LoRAs go into a copy of W
        pytest.param("native", 100, marks=needs_native),
        pytest.param("triton", 9, marks=needs_triton),
    ],
)
@pytest.mark.parametrize("compute", ["same", "int8", "e4m3"])
@pytest.mark.parametrize("stored", ["float", "int8", "int4", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients(impl, compute, stored, dropout, tokens):
    device = device_of(impl)
    ranks = [[3], [2], [1, 4]]
    plain = make_group(K, OUTS, ranks, torch.float32, device=device, dropout=dropout)
    linears = with_others(stored_as(plain, stored), dropout)
    x, dy = operands(device, torch.float32, tokens)
    options = {"compute": compute, "dropout_seed": torch.tensor(3, device=device)}
    group = LinearGroup(linears, torch.float32, impl=impl, **options)
    mask = group.dropped(torch.ones_like(x), dropout).double() if dropout else torch.ones_like(x)
    expected = wanted(x, dy, linears, compute, mask)
    made = actual(x, dy, linears, impl, **options)
    of_products = product_tolerance(TOLERANCES[torch.float32], compute, x.device)
    for i, (a, e) in enumerate(zip(made, expected, strict=True)):
        # y and dx; the adapters' gradients are sums of values
        assert relative_error(a, e) < (of_products if i < 2 else TOLERANCES[torch.float32]), i


def test_in_double_precision():
    linears = with_others(make_group(K, OUTS, [[3], [2], [1, 4]], torch.float64))
    x, dy = operands("cpu", torch.float64)
    expected = wanted(x, dy, linears, "same", 1)
    for made in (actual(x, dy, linears, "ref"), by_reference(x, dy, linears)):
        for a, e in zip(made, expected, strict=True):
            assert relative_error(a, e) < 1e-12


def by_reference(x, dy, linears):
    x = x.detach().requires_grad_()
    y = lora_linear_ref(x, linears)
    leaves = [t for p in linears for t in tensors_of(p.adapters)]
    return [y, *torch.autograd.grad(y, [x, *leaves], dy)]


def test_a_lora_gives_the_same_beside_and_fused():
    """What `Lora` says of itself as an adapter is what the group computes."""
    (p,) = make_group(24, [16], [[3]], torch.float64)
    (lora,) = p.adapters
    x, dy = (torch.randn(5, n, dtype=torch.float64) for n in (24, 16))
    y, dx = torch.zeros(5, 16, dtype=torch.float64), torch.zeros(5, 24, dtype=torch.float64)
    with torch.no_grad():
        lora.add_to(y, x)
        grads = lora.backward(dy, x, dx)
    bare = LinearParams(torch.zeros(16, 24, dtype=torch.float64), None, (lora,))
    fused = x.clone().requires_grad_()
    out = lora_linear(fused, [bare])
    expected = [out, *torch.autograd.grad(out, [fused, *lora.tensors], dy)]
    for a, e in zip([y, dx, *grads], expected, strict=True):
        assert relative_error(a, e) < 1e-12


@every_impl
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_no_gradient_of_x(impl, compute):
    """The adapters' gradients are the same where x takes none; they see x's outliers, too."""
    device = device_of(impl)
    linears = with_others(make_group(K, OUTS, [[3], [], [1]], torch.float32, device=device))
    x, dy = operands(device, torch.float32)
    leaves = [t for p in linears for t in tensors_of(p.adapters)]
    options = {"impl": impl, "compute": compute, "outliers": 2 if compute == "int8" else 0}
    y = lora_linear(x, linears, **options)
    with_dx = x.clone().requires_grad_()
    both = torch.autograd.grad(lora_linear(with_dx, linears, **options), [with_dx, *leaves], dy)
    for a, e in zip(torch.autograd.grad(y, leaves, dy), both[1:], strict=True):
        assert torch.equal(a, e)


def test_gradients_come_in_the_dtype_of_the_tensors():
    linears = with_others(make_group(K, OUTS, [[3], [2], [1]], torch.float32, store=torch.bfloat16))
    x, dy = operands("cpu", torch.float32)
    leaves = [t for p in linears for t in tensors_of(p.adapters)]
    made = actual(x, dy, linears, "auto")
    assert (
        [g.dtype for g in made[2:]] == [t.dtype for t in leaves] == [torch.bfloat16] * len(leaves)
    )
