"""LoKr's products by the native module, beside those in plain torch in fp64; and what a group does
with them: adapters in a copy of W, and dx that they begin.
"""

import pytest
import torch
from op_cases import every_impl, needs_native, needs_triton

from fluxfast.ops.linear import kron
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.pair import LinearPair, pairs
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import RowOutput
from support import among_nans, for_thread_counts, relative_error

# fp32 against fp64: sums of up to 3000 products, whose errors of 6e-8 add up as their square root
FP32 = 3e-6
# O1, I1, O2, I2: less and more than a vector, whole vectors, and factors that fill no tile
SIZES = [
    *((1, 1, 1, 1), (6, 5, 8, 9), (1, 45, 48, 1), (24, 9, 2, 5), (16, 16, 8, 32), (2, 2, 64, 64)),
    *((70, 3, 5, 11), (4, 5, 33, 17), (300, 2, 3, 4), (2, 300, 70, 33)),
]


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def operands(m, o1, i1, o2, i2):
    """x, dy, what y and dx had before, w1, w2, and factors of y's columns."""
    shapes = [(m, i1 * i2), (m, o1 * o2), (m, o1 * o2), (m, i1 * i2), (o1, i1), (o2, i2)]
    made = [rand(*shape, seed=i).float() for i, shape in enumerate(shapes)]
    return *made, rand(o1 * o2, seed=9).float()


def products(x, dy, y, dx, w1, w2, cols, impl, accumulate=True):
    """y, dx, dw1, dw2."""
    kron.add(x, None, w1, w2, 0.3, cols, y, impl)
    grads = kron.backward(dy, x, None, w1, w2, 0.3, cols, dx, accumulate, impl)
    return y, dx, *grads


@needs_native
@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_values_and_gradients(size, rows, scaled, isa):
    x, dy, y, dx, w1, w2, cols = operands(rows, *size)
    cols = cols if scaled else None
    wide = [t.double() for t in (x, dy, y, dx, w1, w2)]
    expected = products(*wide, None if cols is None else cols.double(), "ref")
    # what the module reads lies among NaNs, and factors come in either order
    x, dy, y, dx = map(among_nans, (x, dy, y, dx))
    made = products(x, dy, y, dx, w1.T.contiguous().T, w2.T.contiguous().T, cols, "native")
    # beside what the sums had to be, where terms of few numbers cancel
    sizes = products(*(t.abs() for t in wide), None if cols is None else cols.double().abs(), "ref")
    for i, (a, e, s) in enumerate(zip(made, expected, sizes, strict=True)):
        assert float((a - e).norm() / s.norm()) < FP32, i


@needs_native
@pytest.mark.parametrize("size", [(16, 16, 24, 40), (2, 2, 64, 64)], ids=str)
def test_threads_change_no_bit(size):
    x, dy, y, dx, w1, w2, cols = operands(777, *size)

    def run():
        return products(x, dy, y.clone(), dx.clone(), w1, w2, cols, "native")

    first, *others = for_thread_counts(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_native
@pytest.mark.parametrize("size", [(0, 2, 3, 4, 5), (3, 0, 3, 4, 5), (3, 2, 3, 4, 0)], ids=str)
def test_nothing_to_multiply(size):
    x, dy, y, dx, w1, w2, cols = operands(*size)
    before = y.clone(), dx.clone()
    *rows, dw1, dw2 = products(x, dy, y, dx, w1, w2, cols, "native")
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))
    assert dw1.shape == w1.shape and dw2.shape == w2.shape
    assert not dw1.any() and not dw2.any()


@every_impl
@pytest.mark.parametrize("size", [(6, 5, 8, 9), (3, 130, 5, 6), (130, 3, 5, 6)], ids=str)
def test_a_gradient_of_x_that_is_written(impl, size):
    """dx may hold anything then."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    x, dy, y, dx, w1, w2, cols = (t.to(device) for t in operands(9, *size))
    expected = products(x, dy, y.clone(), torch.zeros_like(dx), w1, w2, cols, impl)
    dx.fill_(torch.nan)
    made = products(x, dy, y, dx, w1, w2, cols, impl, accumulate=False)
    assert all(relative_error(a, e) < 1e-6 for a, e in zip(made, expected, strict=True))


def lokr(o1, i1, o2, i2, seed, dtype=torch.float32, **options):
    factors = (rand(o1, i1, seed=seed),), (rand(o2, i2, seed=seed + 1),)
    return Lokr(*(tuple(w.to(dtype) for w in ws) for ws in factors), 0.3, **options)


@needs_native
@pytest.mark.parametrize(("tokens", "merges"), [(47, False), (48, True), (200, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_within_the_weight(tokens, merges, masked, monkeypatch):
    """Two on one linear, one on the next, none on the third; masks differ with each group."""
    options = {"rank_dropout": 0.5} if masked else {}

    def made(dtype):
        first = lokr(2, 4, 8, 6, 1, dtype), lokr(4, 3, 4, 8, 3, dtype)
        return [
            LinearParams(rand(n, 24, seed=20 + i).to(dtype), None, own)
            for i, (n, own) in enumerate(
                [(16, first), (20, (lokr(4, 6, 5, 4, 5, dtype, **options),)), (12, ())]
            )
        ]

    x, dy = rand(tokens, 24, seed=30), rand(tokens, 48, seed=31)
    whole = []
    for p in made(torch.float64):
        changes = (a.scale * torch.kron(a.w1[0], a.w2[0]) for a in p.adapters)
        whole.append(p.weight + sum(changes))
    seen = []
    add = kron.add
    monkeypatch.setattr(kron, "add", lambda *args: seen.append(args) or add(*args))
    group = LinearGroup(made(torch.float32), torch.float32, impl="native")
    rows = RowOutput(x.float(), None, None)
    y, kept = group.forward(rows)
    dx, grads = group.backward(dy.float(), rows, kept)
    assert group.merges(tokens) == merges
    assert len(seen) == (3 if not merges else 1 if masked else 0)
    assert relative_error(y, x @ torch.cat(whole).T) < FP32
    assert relative_error(dx, dy @ torch.cat(whole)) < FP32
    adapters = [(i, a) for i, p in enumerate(made(torch.float64)) for a in p.adapters]
    of_linears = dy.split_with_sizes([16, 20, 12], dim=1)
    for (i, a), grad in zip(adapters, grads, strict=True):
        expected = a.backward(of_linears[i], x, None)
        assert all(relative_error(g, e) < FP32 for g, e in zip(grad, expected, strict=True))


@needs_triton
@pytest.mark.parametrize("adapted", [(True, False), (False, True), (True, True)], ids=str)
def test_two_parts_of_which_one_has_a_lokr(adapted):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [rand(12, 10, seed=i) for i in (1, 2)]
    adapters = [
        (lokr(3, 2, 4, 5, 3 + i, torch.float64),) if on else () for i, on in enumerate(adapted)
    ]
    params = [
        LinearParams(
            w.float().to(device), None,
            tuple(a.with_tensors([t.float().to(device) for t in a.tensors]) for a in own),
        )
        for w, own in zip(weights, adapters, strict=True)
    ]  # fmt: skip
    txt, img = (LinearGroup([p], torch.float32, impl="triton", dgrad=True) for p in params)
    assert pairs(txt, img)
    pair = LinearPair(txt, img, Parts(3, 1))
    x, dy = rand(7, 10, seed=5), rand(7, 12, seed=6)
    given = RowOutput(x.float().to(device), None, None)
    y, kept = pair.forward(given)
    dx, grads = pair.backward(dy.float().to(device), given, kept)
    for part, w, own, of_part in zip(
        (slice(3), slice(3, None)), weights, adapters, grads, strict=True
    ):
        whole = w + sum(a.scale * torch.kron(a.w1[0], a.w2[0]) for a in own)
        assert relative_error(y[part].cpu(), x[part] @ whole.T) < FP32
        assert relative_error(dx[part].cpu(), dy[part] @ whole) < FP32
        for a, made in zip(own, of_part, strict=True):
            expected = a.backward(dy[part], x[part], None)
            assert all(
                relative_error(g.cpu(), e) < FP32 for g, e in zip(made, expected, strict=True)
            )
