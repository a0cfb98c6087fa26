"""`LinearGroup` on the CPU: adapters that go into a copy of W where that is the shorter way."""

import pytest
import torch
from lora_cases import device_of
from op_cases import needs_native

from fluxfast.ops.linear import products_native
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import RowOutput, row_quant_ref
from support import among_nans, for_thread_counts, relative_error


def linears(counts=(1, 0, 2), weight_dtype=torch.float32, dropout=0.0, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(device)

    def adapter():
        return Lora(randn(3, 24), randn(16, 3), 0.7, dropout)

    return [
        LinearParams(randn(16, 24).to(weight_dtype), randn(16), tuple(adapter() for _ in range(n)))
        for n in counts
    ]


def both_ways(params, tokens, impl, dtype, **options):
    """Forward's y and s, backward's dx and gradients, and whether W was replaced by a copy with the
    adapters in it.
    """
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, n, generator=g, dtype=torch.float64).to(dtype) for n in (24, 48))
    group = LinearGroup(params, dtype, impl=impl, **options)
    y, s = group.forward(RowOutput(x, None, None))
    dx, grads = group.backward(dy, RowOutput(x, None, None), s)
    return [y, s, dx, *(grad for pair in grads for grad in pair)], group.merges(tokens)


# fp32 against fp64: sums of up to 64 products, 6e-8 each
FP32 = 3e-6


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "merged"), [(1, False), (47, False), (48, True), (63, True)])
def test_adapters_within_the_weight(tokens, merged, weight_dtype):
    params = linears(weight_dtype=weight_dtype)
    before = [p.weight.clone() for p in params]
    actual, merges = both_ways(params, tokens, "native", torch.float32)
    assert merges == merged
    doubles = [
        LinearParams(
            p.weight.double(),
            p.bias.double(),
            tuple(a._replace(a=a.a.double(), b=a.b.double()) for a in p.adapters),
        )
        for p in params
    ]
    expected, _ = both_ways(doubles, tokens, "ref", torch.float64)
    if merged:
        # s is nobody's then: backward makes it where it needs it
        assert actual.pop(1) is None
        expected.pop(1)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < FP32
    assert all(torch.equal(p.weight, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"compute": "int8"},
        {"dropout_seed": torch.tensor(3)},
        {"params": linears(counts=(0, 0, 0))},
        {"impl": "ref"},
    ],
)
def test_where_they_stay_apart(options):
    params = options.pop("params", linears(dropout=0.5))
    impl = options.pop("impl", "native")
    assert not LinearGroup(params, torch.float32, impl=impl, **options).merges(1000)


# ranks of less than a vector, one, and more than a tile; rows of less than a block, and several
# tasks of blocks
@pytest.mark.parametrize("rows", [0, 1, 63, 1000])
@pytest.mark.parametrize("ranks", [[[3], [16]], [[17, 2], [70]], [[], [1, 1, 40]]])
def test_adapter_grads(isa, rows, ranks):
    g = torch.Generator().manual_seed(3)
    outs, k = [67, 30], 45

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    wide_x, wide_dy = randn(rows, k + 5), randn(rows, sum(outs) + 3)
    flat = [(i, r) for i, of_linear in enumerate(ranks) for r in of_linear]
    a, b = [randn(r, k) for _, r in flat], [randn(outs[i], r) for i, r in flat]
    scales, cols = [0.5 + j for j in range(len(flat))], [i * outs[0] for i, _ in flat]
    x, dy = wide_x[:, 2 : 2 + k], wide_dy[:, 1 : 1 + sum(outs)]
    # what the module reads lies among NaNs
    x32, dy32 = (among_nans(t) for t in (x.float(), dy.float()))
    d_a, d_b = products_native.lora_grads(
        x32, dy32, [t.float() for t in a], [t.float() for t in b], scales, cols
    )
    for j, (i, _) in enumerate(flat):
        part = dy[:, cols[j] : cols[j] + outs[i]]
        # fp32: sums of up to 1000 products, whose errors of 6e-8 add up as their square root
        assert relative_error(d_a[j], scales[j] * (part @ b[j]).T @ x) < 2e-6
        assert relative_error(d_b[j], scales[j] * part.T @ (x @ a[j].T)) < 2e-6


@needs_native
def test_threads_change_no_bit():
    g = torch.Generator().manual_seed(4)
    x, dy, a, b = (
        torch.randn(*shape, generator=g) for shape in ((777, 64), (777, 48), (8, 64), (48, 8))
    )

    def run():
        (d_a,), (d_b,) = products_native.lora_grads(x, dy, [a], [b], [1.0], [0])
        return d_a, d_b

    first, *others = for_thread_counts(run)
    assert all(torch.equal(first[i], other[i]) for other in others for i in (0, 1))


def with_outliers(channels=4, size=40.0):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(63, 24, generator=g)
    x[:, torch.randperm(24, generator=g)[:channels]] *= size
    return x


@pytest.mark.parametrize("impl", ["native", "ref", "triton"])
@pytest.mark.parametrize("compute", ["int8", "e4m3"])
@pytest.mark.parametrize("counts", [(1, 0, 2), (0, 0, 0)])
def test_outliers_stay_out_of_the_codes(impl, compute, counts):
    device = device_of(impl)
    params, x = linears(counts, device=device), RowOutput(with_outliers().to(device), None, None)
    exact = LinearGroup(params, torch.float32, impl="ref").forward(x)[0]
    group = LinearGroup(params, torch.float32, compute=compute, outliers=4, impl=impl)
    assert group.form == "same"
    y, s = group.forward(x)
    codes = x._replace(y=None, **row_codes(x.y, compute))
    plain = LinearGroup(params, torch.float32, compute=compute, impl=impl).forward(codes)[0]
    # against the part of y that the other channels make: the outliers' own is 40 times as large,
    # and exact but for W's codes
    small = x.y.abs().amax(0) < 20
    rest = LinearGroup(
        [p._replace(weight=p.weight[:, small], bias=None, adapters=()) for p in params],
        torch.float32,
        impl="ref",
    ).forward(RowOutput(x.y[:, small], None, None))[0]
    w_error = 0.007 * exact.norm() if compute == "int8" else 0.03 * exact.norm()
    assert (y - exact).norm() < 0.015 * rest.norm() + w_error
    if compute == "int8":
        assert (plain - exact).norm() > 1.5 * (y - exact).norm()
    if s is not None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device)
        dx, grads = group.backward(dy, x, s)
        expected_dx, expected = LinearGroup(params, torch.float32, impl="ref").backward(
            dy, x, LinearGroup(params, torch.float32, impl="ref").down(x)
        )
        assert relative_error(dx, expected_dx) < (0.02 if compute == "int8" else 0.06)
        for pair, wanted in zip(grads, expected, strict=True):
            # no codes of x in these
            assert all(relative_error(a, e) < 3e-6 for a, e in zip(pair, wanted, strict=True))


def row_codes(x, compute):
    q, scale = row_quant_ref(x, compute)
    return {"q": q, "q_scale": scale}
