import pytest
import torch
from op_checks import (
    assert_matches_fp64,
    assert_same_for_any_thread_count,
    outputs_and_grads,
    randn,
    saved_shapes,
)

from fluxfast.ops.gated_residual import gated_residual, gated_residual_ref

SHAPES = [(2, 63, 1000), (3, 17, 63), (1, 1, 1), (2, 300, 128)]


def native(x, gate, y):
    return gated_residual(x, gate, y, impl="native")


def make(batch, tokens, dim):
    return (
        randn(batch, tokens, dim, seed=1),
        randn(batch, dim, seed=2),
        randn(batch, tokens, dim, seed=3),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_fp64(isa, poisoned, shape):
    assert_matches_fp64(native, gated_residual_ref, make(*shape))


@pytest.mark.parametrize(
    "needed",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True)],
)
def test_only_the_gradients_asked_for(isa, needed):
    inputs = [t.detach().requires_grad_(n) for t, n in zip(make(2, 63, 40), needed, strict=True)]
    assert_matches_fp64(native, gated_residual_ref, inputs)


def test_ref_is_the_formula():
    x, gate, y = (t.detach().double() for t in make(2, 5, 63))
    torch.testing.assert_close(gated_residual_ref(x, gate, y), x + gate.unsqueeze(1) * y)


def test_ref_gradients():
    assert torch.autograd.gradcheck(
        gated_residual_ref, [t.detach().double().requires_grad_() for t in make(2, 3, 7)]
    )


def test_strided_inputs_and_gradient(isa, poisoned):
    modulation = randn(2, 6 * 63, seed=4)

    def op(fn):
        def run(joint, modulation, y):
            gate = modulation.chunk(6, dim=-1)[2]
            return fn(joint[:, 5:], gate, y.transpose(1, 2)).transpose(1, 2)

        return run

    assert_matches_fp64(
        op(native),
        op(gated_residual_ref),
        (randn(2, 21, 63, seed=5), modulation, randn(2, 63, 16, seed=6)),
    )


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)])
def test_no_tokens(isa, poisoned, shape):
    outs, grads = outputs_and_grads(native, make(*shape))
    assert outs[0].shape == shape
    assert [tuple(g.shape) for g in grads] == [shape, (shape[0], 16), shape]
    assert grads[1].abs().sum() == 0


def test_same_for_any_thread_count(isa):
    assert_same_for_any_thread_count(native, make(2, 211, 300))


def test_nan_stays_where_it_is(isa):
    x, gate, y = make(2, 40, 33)
    with torch.no_grad():
        y[1, 7, 3] = float("nan")
    (out,), (dx, dgate, dy) = outputs_and_grads(native, (x, gate, y))
    assert out.isnan().nonzero().tolist() == [[1, 7, 3]]
    assert dgate.isnan().nonzero().tolist() == [[1, 3]]
    assert not dx.isnan().any()
    assert not dy.isnan().any()


def test_keeps_y_only_for_the_gates_gradient(isa):
    x, gate, y = make(2, 9, 16)
    assert saved_shapes(lambda: native(x, gate, y)) == [(2, 9, 16), (2, 16)]
    assert saved_shapes(lambda: native(x, gate.detach(), y)) == [(2, 16)]


def test_the_gradient_of_x_is_not_copied(isa):
    """Inside one graph: the gradient that reaches x's producer is the very memory that came in."""
    x, gate, y = make(1, 9, 16)
    seen = []
    base = x * 1
    base.register_hook(lambda grad: seen.append(grad.data_ptr()))
    dout = randn(1, 9, 16, grad=False)
    native(base, gate, y).backward(dout)
    assert seen == [dout.data_ptr()]


def test_wrong_shapes_are_refused():
    x, gate, y = make(2, 9, 16)
    with pytest.raises(ValueError, match=r"gate \[2, 9, 16\]"):
        gated_residual(x, y, y)
    with pytest.raises(ValueError, match=r"y \[2, 8, 16\]"):
        gated_residual(x, gate, y[:, 1:])
