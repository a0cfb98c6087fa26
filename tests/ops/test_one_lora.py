"""A group of one linear with one LoRA, or none, which takes a shorter way on the CPU."""

import pytest
import torch
from op_cases import needs_native

from fluxfast.ops.linear import one_lora
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lora_linear import lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import RowOutput
from support import among_nans, relative_error

# fp32 against fp64: sums of up to 1000 products, 6e-8 each, which mostly cancel out
FP32 = 5e-6
# a gradient that is rounded to bf16
BF16 = 4e-3


def case(k, n, *, adapter_dtype=torch.float32, bias=True, scale=0.5, rank=5):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    lora = Lora(randn(rank, k).to(adapter_dtype), randn(n, rank).to(adapter_dtype), scale)
    linear = LinearParams(randn(n, k), randn(n) if bias else None, (lora,))
    return linear, randn(2, 7, k), randn(2, 7, n)


def poisoned(x):
    """The same x [B, S, K] in rows that NaNs lie between."""
    return among_nans(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def by_autograd(linear, x, dy):
    """y, dx, dA and dB of the reference in fp64."""
    (lora,) = linear.adapters
    x, a, b = (t.double().requires_grad_() for t in (x, lora.a, lora.b))
    bias = None if linear.bias is None else linear.bias.double()
    exact = LinearParams(linear.weight.double(), bias, (Lora(a, b, lora.scale),))
    y = lora_linear_ref(x, [exact])
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy.double())


def both_ways(group, x, dy):
    y, s = group.forward(RowOutput(x, None, None))
    dx, ((d_a, d_b),) = group.backward(dy, RowOutput(x, None, None), s)
    return y, dx, d_a, d_b


@needs_native
@pytest.mark.parametrize("impl", ["native", "ref"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize(("k", "n"), [(63, 1000), (1000, 63)])
def test_values_and_gradients(k, n, scale, bias, impl, monkeypatch):
    linear, x, dy = case(k, n, scale=scale, bias=bias)
    taken = []
    for name in ("forward", "backward"):
        run = getattr(one_lora, name)
        monkeypatch.setattr(one_lora, name, lambda *a, run=run: taken.append(run) or run(*a))
    actual = both_ways(LinearGroup([linear], torch.float32, impl=impl), poisoned(x), dy)
    assert len(taken) == 2
    for ours, exact in zip(actual, by_autograd(linear, x, dy), strict=True):
        assert ours.shape == exact.shape and relative_error(ours, exact) < FP32


@needs_native
def test_adapters_in_another_dtype():
    linear, x, dy = case(63, 100, adapter_dtype=torch.bfloat16)
    y, dx, d_a, d_b = both_ways(LinearGroup([linear], torch.float32, impl="native"), x, dy)
    wanted = by_autograd(linear, x, dy)
    assert d_a.dtype == d_b.dtype == torch.bfloat16
    for ours, exact, limit in zip((y, dx, d_a, d_b), wanted, (FP32, FP32, BF16, BF16), strict=True):
        assert relative_error(ours, exact) < limit


@needs_native
def test_parts_that_nobody_asks_for():
    """Without dx no weight is decoded; s that is given is not computed again."""
    linear, x, dy = case(63, 100)
    group = LinearGroup([linear], torch.float32, impl="native")
    y, s = group.forward(RowOutput(x, None, None))
    again, same = LinearGroup([linear], torch.float32, impl="native").forward(
        RowOutput(x, None, None), kept=s
    )
    assert same is s and torch.equal(again, y)
    dx, ((d_a, d_b),) = group.backward(dy, RowOutput(x, None, None), s, need_dx=False)
    assert dx is None
    _, ((full_a, full_b),) = group.backward(dy, RowOutput(x, None, None), s)
    assert torch.equal(d_a, full_a) and torch.equal(d_b, full_b)


@needs_native
def test_a_linear_without_adapters():
    linear, x, dy = case(63, 100)
    plain = linear._replace(adapters=())
    group = LinearGroup([plain], torch.float32, impl="native")
    y, s = group.forward(RowOutput(poisoned(x), None, None))
    dx, grads = group.backward(dy, RowOutput(x, None, None), s)
    assert s is None and grads == []
    exact = x.double() @ plain.weight.double().T + plain.bias.double()
    assert relative_error(y, exact) < FP32
    assert relative_error(dx, dy.double() @ plain.weight.double()) < FP32


@needs_native
@pytest.mark.parametrize("what", ["places", "two", "many tokens"])
def test_what_takes_the_common_way(what, monkeypatch):
    """Gradients that go to given memory, several LoRAs, and tokens for a copy of W."""
    linear, x, dy = case(24, 16)
    (lora,) = linear.adapters
    if what == "places":
        lora = lora._replace(grads=(torch.empty_like(lora.a), torch.empty_like(lora.b)))
        linear = linear._replace(adapters=(lora,))
    elif what == "two":
        linear = linear._replace(adapters=(lora, lora))
    else:
        x, dy = x.repeat(1, 9, 1), dy.repeat(1, 9, 1)
    monkeypatch.setattr(one_lora, "backward", None)
    group = LinearGroup([linear], torch.float32, impl="native")
    y, s = group.forward(RowOutput(x, None, None))
    _, grads = group.backward(dy, RowOutput(x, None, None), s)
    if what == "places":
        assert grads[0][0] is lora.grads[0] and grads[0][1] is lora.grads[1]
    exact = linear._replace(adapters=linear.adapters[:1])
    if what != "two":
        for ours, wanted in zip(
            (y, *grads[0]), _without_dx(by_autograd(exact, x, dy)), strict=True
        ):
            assert relative_error(ours, wanted) < FP32


def _without_dx(found):
    y, _, d_a, d_b = found
    return y, d_a, d_b
