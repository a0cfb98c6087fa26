import pytest
import torch
from op_checks import (
    assert_matches_fp64,
    assert_same_for_any_thread_count,
    outputs_and_grads,
    randn,
    saved_shapes,
)

from fluxfast.ops.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_ref

SHAPES = [(2, 63, 1000), (3, 17, 63), (1, 1, 5), (2, 300, 128)]


def native(x, scale, shift):
    return modulated_layer_norm(x, scale, shift, impl="native")


def make(batch, tokens, dim, *, modulation_grad=True):
    x = randn(batch, tokens, dim, seed=1, grad=False).mul_(3).add_(0.5).requires_grad_()
    return (
        x,
        randn(batch, dim, seed=2, grad=modulation_grad),
        randn(batch, dim, seed=3, grad=modulation_grad),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_fp64(isa, poisoned, shape):
    assert_matches_fp64(native, modulated_layer_norm_ref, make(*shape))


@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True)])
def test_only_the_gradients_asked_for(isa, needed):
    x, scale, shift = make(2, 63, 40)
    inputs = x, scale.detach().requires_grad_(needed[0]), shift.detach().requires_grad_(needed[1])
    assert_matches_fp64(native, modulated_layer_norm_ref, inputs)


def test_ref_is_the_formula():
    x, scale, shift = (t.detach().double() for t in make(2, 5, 63))
    mean = x.mean(-1, keepdim=True)
    std = ((x - mean).square().mean(-1, keepdim=True) + 1e-2).sqrt()
    expected = (x - mean) / std * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_layer_norm_ref(x, scale, shift, eps=1e-2), expected)


def test_ref_gradients():
    inputs = [t.detach().double().requires_grad_() for t in make(2, 3, 7)]
    assert torch.autograd.gradcheck(modulated_layer_norm_ref, inputs)


def test_ref_rounds_bf16_once():
    x, scale, shift = (t.detach().bfloat16() for t in make(1, 9, 64))
    exact = modulated_layer_norm_ref(x.double(), scale.double(), shift.double())
    out = modulated_layer_norm_ref(x, scale, shift)
    # half a unit in the last of bf16's 8 bits, and a little for the fp32 before it
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 * 1.01, atol=1e-6)


def test_eps(isa):
    x, scale, shift = make(1, 9, 64)
    out = modulated_layer_norm(x * 1e-3, scale, shift, eps=1e-2, impl="native")
    expected = modulated_layer_norm_ref(x.double() * 1e-3, scale.double(), shift.double(), eps=1e-2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_strided_inputs_and_gradient(isa, poisoned):
    """Modulation as chunks of one projection, x a slice of the joint tokens, the gradient with a
    strided last dimension.
    """
    modulation = randn(2, 6 * 63, seed=4)

    def op(fn):
        def run(x, modulation):
            shift, scale, *_ = modulation.chunk(6, dim=-1)
            y = fn(x[:, 5:], scale, shift)
            return y.transpose(1, 2)

        return run

    for x in (
        randn(2, 21, 63, seed=5),
        randn(2, 63, 21, seed=5, grad=False).transpose(1, 2).requires_grad_(),
    ):
        assert_matches_fp64(op(native), op(modulated_layer_norm_ref), (x, modulation))


def test_gradient_broadcast_from_one_number(isa):
    x, scale, shift = make(2, 33, 20)
    native(x, scale, shift).sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (x, scale, shift)]
    modulated_layer_norm_ref(*doubles).sum().backward()
    for ours, ref in zip((x, scale, shift), doubles, strict=True):
        torch.testing.assert_close(ours.grad.double(), ref.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)])
def test_no_tokens(isa, poisoned, shape):
    outs, grads = outputs_and_grads(native, make(*shape))
    assert outs[0].shape == shape
    assert [tuple(g.shape) for g in grads] == [shape, (shape[0], 16), (shape[0], 16)]
    assert all(g.abs().sum() == 0 for g in grads)


def test_same_for_any_thread_count(isa):
    assert_same_for_any_thread_count(native, make(2, 211, 300))


def test_nan_stays_in_its_row(isa):
    x, scale, shift = make(2, 40, 33)
    with torch.no_grad():
        x[1, 7, 3] = float("nan")
    (out,), (dx, dscale, dshift) = outputs_and_grads(native, (x, scale, shift))
    bad = torch.zeros(2, 40, dtype=torch.bool)
    bad[1, 7] = True
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(dx.isnan().any(-1), bad)
    assert torch.equal(dscale.isnan().all(-1), torch.tensor([False, True]))
    assert not dshift.isnan().any()


def test_keeps_x_statistics_and_scale_only(isa):
    x, scale, shift = make(2, 9, 16)
    assert saved_shapes(lambda: native(x, scale, shift)) == [(2, 9), (2, 9), (2, 9, 16), (2, 16)]


def test_wrong_shapes_are_refused():
    x, scale, shift = make(2, 9, 16)
    with pytest.raises(ValueError, match=r"scale and shift \[B, D\].*\[1, 16\]"):
        modulated_layer_norm(x, scale[:1], shift)
    with pytest.raises(ValueError, match=r"expected x \[B, S, D\]"):
        modulated_layer_norm(x[0], scale, shift)
