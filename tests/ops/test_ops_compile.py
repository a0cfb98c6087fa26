"""The ops under torch.compile and under fake tensors, where a registered op stands for the launcher."""

import pytest
import torch
from op_checks import outputs_and_grads, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast.ops import _impl
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope

pytestmark = pytest.mark.skipif(not _impl.HAS_NATIVE, reason="the native module was not built")

HEADS, DIM = 2, 8
WIDTH = 3 * HEADS * DIM


def gated_residual_case(tokens):
    return gated_residual, [randn(2, tokens, 12, seed=1), randn(2, 12, seed=2), randn(2, tokens, 12, seed=3)]


def gelu_case(tokens):
    return gelu, [randn(2, tokens, 12)]


def modulated_layer_norm_case(tokens):
    return modulated_layer_norm, [randn(2, tokens, 12, seed=1), randn(2, 12, seed=2), randn(2, 12, seed=3)]


def frozen_modulated_layer_norm_case(tokens):
    op, (x, scale, shift) = modulated_layer_norm_case(tokens)
    return op, [x, scale.detach(), shift.detach()]


def qk_norm_rope_case(tokens):
    def op(qkv, txt_qkv, weights, cos, sin, index):
        q, k, v = qk_norm_rope(
            *(qkv, weights[0], weights[1], cos, sin),
            heads=HEADS,
            txt_qkv=txt_qkv,
            txt_q_weight=weights[2],
            txt_k_weight=weights[3],
            index=index,
        )
        return q, k, v

    angle = randn(tokens + 9, DIM // 2, seed=4, grad=False)
    index = torch.arange(tokens + 3).flip(0) + 2
    tensors = [randn(2, tokens, WIDTH, seed=1), randn(2, 3, WIDTH, seed=2), 1 + randn(4, DIM, seed=3, grad=False)]
    return op, [*tensors, angle.cos(), angle.sin(), index]


def joint_qk_norm_rope_case(tokens):
    def op(qkv, weights, cos, sin):
        return qk_norm_rope(qkv, weights[0], weights[1], cos, sin, heads=HEADS)

    angle = randn(tokens, DIM // 2, seed=4, grad=False)
    return op, [randn(2, tokens, WIDTH, seed=1), 1 + randn(2, DIM, seed=3, grad=False), angle.cos(), angle.sin()]


CASES = [
    gated_residual_case,
    gelu_case,
    modulated_layer_norm_case,
    frozen_modulated_layer_norm_case,
    qk_norm_rope_case,
    joint_qk_norm_rope_case,
]
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_compiled_equals_eager(case):
    torch._dynamo.reset()
    compiled = None
    for tokens in (6, 11, 17):
        op, inputs = case(tokens)
        compiled = compiled or torch.compile(op, fullgraph=True, backend="aot_eager")
        # the first two compile; whatever comes after that has nothing new in it
        with torch.compiler.set_stance("default" if tokens < 17 else "fail_on_recompile"):
            outs, grads = outputs_and_grads(compiled, inputs)
        expected_outs, expected_grads = outputs_and_grads(op, inputs)
        for actual, expected in zip(outs + grads, expected_outs + expected_grads, strict=True):
            # qk_norm_rope keeps other tensors when compiled, and so rounds elsewhere
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_case
def test_fake_tensors_go_through(case):
    op, inputs = case(6)
    expected_outs, expected_grads = outputs_and_grads(op, inputs)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in inputs]
    with mode:
        outs = op(*fakes)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    for fake, real in zip(outs + [t.grad for t in fakes], expected_outs + expected_grads, strict=True):
        assert (fake is None) == (real is None)
        if real is not None:
            assert fake.shape == real.shape
            assert fake.stride() == real.stride()
            assert fake.dtype == real.dtype


def registered_calls():
    x, y = randn(2, 6, 12, grad=False), randn(2, 6, 12, seed=1, grad=False)
    gate = randn(2, 12, seed=2, grad=False)
    ops = torch.ops.fluxfast
    yield ops.gelu_fwd, (x,)
    yield ops.gelu_bwd, (y, x)
    yield ops.gated_residual_fwd, (x, gate, y)
    yield ops.gated_residual_bwd, (x, gate, y)
    yield ops.gated_residual_bwd, (x, gate, None)
    yield ops.modulated_layer_norm_fwd, (x, gate, gate, 1e-6)
    stats = ops.modulated_layer_norm_fwd(x, gate, gate, 1e-6)[1]
    yield ops.modulated_layer_norm_bwd, (y, x, stats, gate, True)
    yield ops.modulated_layer_norm_bwd, (y, x, stats, gate, False)

    qkv, txt_qkv = randn(2, 6, WIDTH, grad=False), randn(2, 3, WIDTH, seed=1, grad=False)
    weights = 1 + randn(4, DIM, seed=2, grad=False)
    angle = randn(9, DIM // 2, seed=3, grad=False)
    constants = (weights, angle.cos(), angle.sin(), None)
    yield ops.qk_norm_rope_fwd, (qkv, txt_qkv, *constants, HEADS, 1e-6)
    yield ops.qk_norm_rope_fwd, (qkv, None, *constants, HEADS, 1e-6)
    q, k, v, rstd = ops.qk_norm_rope_fwd(qkv, txt_qkv, *constants, HEADS, 1e-6)
    yield ops.qk_norm_rope_bwd, (q, k, v, rstd, *constants, 3, q, k, None, None)
    yield ops.qk_norm_rope_bwd, (q, k, v, rstd, *constants, 3, None, None, qkv, txt_qkv)


@pytest.mark.parametrize("number", range(12))
def test_registration(number):
    calls = list(registered_calls())
    assert len(calls) == 12
    op, arguments = calls[number]
    torch.library.opcheck(op, arguments)
