"""forward and backward of every op, called as a block calls them, against autograd through the
public op.
"""

import pytest
import torch
from op_cases import (
    HEADS,
    TXT,
    every_impl,
    gated_residual_case,
    gelu_case,
    joint_qk_norm_rope_case,
    modulated_layer_norm_case,
    qk_norm_rope_case,
    token_gather_case,
    token_scatter_case,
)
from op_checks import TRITON_DEVICE, outputs_and_grads, randn

from fluxfast.ops import (
    dispatch,
    gated_residual,
    gelu,
    modulated_layer_norm,
    qk_norm_rope,
    row_quant,
    token_route,
)
from fluxfast.ops.device import pretend
from support import assert_same, relative_error

# each takes an implementation and inputs, and returns the outputs, and what makes gradients of
# theirs, given which are needed


def raw_gated_residual(impl, *inputs):
    out, saved = gated_residual.forward(*inputs, impl=impl)
    return [out], lambda grads, needs: gated_residual.backward(*grads, saved, needs, impl=impl)


def raw_gelu(impl, x):
    out, saved = gelu.forward(x, impl=impl)
    return [out.y], lambda grads, needs: gelu.backward(*grads, saved, needs, impl=impl)


def raw_modulated_layer_norm(impl, *inputs):
    out, saved = modulated_layer_norm.forward(*inputs, impl=impl)
    return [out.y], lambda grads, needs: modulated_layer_norm.backward(
        *grads, saved, needs, impl=impl
    )


def raw_qk_norm_rope(keep_outputs):
    def run(impl, qkv, txt_qkv, weights, cos, sin, index=None):
        sizes = {"heads": HEADS, "keep_outputs": keep_outputs, "impl": impl}
        outs, saved = qk_norm_rope.forward(qkv, txt_qkv, weights, cos, sin, index, **sizes)
        kept = [t is not None for t in saved[5:]]
        assert kept == (
            [True, True, False, False]
            if keep_outputs
            else [False, False, True, txt_qkv is not None]
        )
        s_txt = 0 if txt_qkv is None else TXT
        return outs, lambda grads, needs: qk_norm_rope.backward(
            grads, saved, needs, s_txt=s_txt, impl=impl
        )

    return run


def raw_joint_qk_norm_rope(impl, qkv, *constants):
    outs, backward = raw_qk_norm_rope(False)(impl, qkv, None, *constants)
    return outs, lambda grads, needs: backward(grads, (*needs, False))[:1]


def raw_token_gather(impl, x, idx):
    out, saved = token_route.gather_forward(x, idx, impl=impl)
    return [out], lambda grads, needs: token_route.gather_backward(
        *grads, saved, needs, tokens=x.shape[1], impl=impl
    )


def raw_token_scatter(impl, base, y, idx):
    out, saved = token_route.scatter_forward(base, y, idx, impl=impl)
    return [out], lambda grads, needs: token_route.scatter_backward(*grads, saved, needs, impl=impl)


RAW = [
    pytest.param(gated_residual_case, raw_gated_residual, 1e-13, id="gated_residual"),
    pytest.param(gelu_case, raw_gelu, 1e-13, id="gelu"),
    pytest.param(
        modulated_layer_norm_case, raw_modulated_layer_norm, 1e-13, id="modulated_layer_norm"
    ),
    pytest.param(qk_norm_rope_case, raw_qk_norm_rope(False), 1e-13, id="qk_norm_rope"),
    # the tables come from fp32 and are rotations to its precision, which is what taking them back
    # costs
    pytest.param(qk_norm_rope_case, raw_qk_norm_rope(True), 1e-7, id="qk_norm_rope-from_outputs"),
    pytest.param(joint_qk_norm_rope_case, raw_joint_qk_norm_rope, 1e-13, id="joint_qk_norm_rope"),
    pytest.param(token_gather_case, raw_token_gather, 1e-13, id="token_gather"),
    pytest.param(token_scatter_case, raw_token_scatter, 1e-13, id="token_scatter"),
]


@every_impl
@pytest.mark.parametrize(("case", "raw", "fp64_tolerance"), RAW)
def test_equals_autograd(case, raw, fp64_tolerance, impl):
    if impl == "native" and case in (token_gather_case, token_scatter_case):
        pytest.skip("the native module doesn't route tokens")
    # the reference's backward is a formula of its own: in fp64 it must be autograd's to the last
    # digits
    dtype, tolerance = (torch.float64, fp64_tolerance) if impl == "ref" else (torch.float32, 2e-6)
    op, inputs = case(5, impl)
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    inputs = [
        x.detach()
        .to(device, dtype if x.is_floating_point() else x.dtype)
        .requires_grad_(x.requires_grad)
        for x in inputs
    ]
    expected_outs, expected_grads = outputs_and_grads(op, inputs)
    learned = [i for i, x in enumerate(inputs) if x.requires_grad]

    with torch.no_grad():
        outs, backward = raw(impl, *inputs)
        for out, expected in zip(outs, expected_outs, strict=True):
            assert torch.equal(out, expected)
        generator = torch.Generator().manual_seed(7)
        douts = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outs
        ]
        for needs in [[True] * len(learned), *([i == one for i in learned] for one in learned)]:
            grads = backward(douts, needs)
            assert len(grads) == len(needs)
            for i, needed, grad in zip(learned, needs, grads, strict=True):
                assert (grad is not None) == needed
                if grad is not None:
                    assert grad.dtype == dtype
                    assert relative_error(grad, expected_grads[i]) <= tolerance


def packed_layouts(device="cpu"):
    """By name: qkv, txt_qkv, and whether v can be a view of them."""
    width, tokens = 3 * HEADS * 10, TXT + 5
    whole = randn(2, tokens, 2 * width, seed=1, grad=False).to(device)
    joint, flat = whole[..., 4 : 4 + width], whole.view(-1, 2 * width)[:, :width]
    texts, images = flat[: 2 * TXT].unflatten(0, (2, TXT)), flat[2 * TXT :].unflatten(0, (2, 5))
    return {
        "one tensor": (joint, None, True),
        "one sample": (joint[:1, TXT:], joint[:1, :TXT], True),
        "two samples": (joint[:, TXT:], joint[:, :TXT], True),
        "no image": (joint[:, TXT:TXT], joint[:, :TXT], True),
        "all text first": (images, texts, False),
        "image first": (joint[:1, :5], joint[:1, 5:], False),
        "a gap": (joint[:1, TXT + 1 :], joint[:1, :TXT], False),
        "other columns": (whole[:1, TXT:, width:], joint[:1, :TXT], False),
        "two tensors": (joint[:, TXT:].clone(), joint[:, :TXT].clone(), False),
    }


@pytest.mark.parametrize("layout", packed_layouts())
@every_impl
def test_v_where_it_lies(impl, layout):
    """The same numbers, which only Triton leaves where the packed projections are one tensor."""
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    qkv, txt_qkv, adjoin = packed_layouts(device)[layout]
    _, (_, _, weights, cos, sin, _) = qk_norm_rope_case(20, impl)
    weights = weights if txt_qkv is not None else weights[:2]
    constants = [t.to(device) for t in (weights, cos, sin)]
    outs = [
        qk_norm_rope.forward(qkv, txt_qkv, *constants, heads=HEADS, view_v=view_v, impl=impl)[0]
        for view_v in (True, False)
    ]
    for view, copy in zip(*outs, strict=True):
        assert torch.equal(view, copy) and copy.is_contiguous()
    v = outs[0][2]
    views = v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert views == (adjoin and impl == "triton") and (views or v.is_contiguous())


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
def test_v_is_a_view_on_tensors_without_memory():
    """What a plan counts is what a GPU allocates."""
    qkv = torch.empty(2, 7, 200, device="meta")[..., : 3 * HEADS * 10]
    table, weights = torch.empty(7, 5, device="meta"), torch.empty(4, 10, device="meta")
    with pretend("sm_90", None):
        for text in (None, qkv[:, :2]):
            rest = (text, weights if text is not None else weights[:2], table, table)
            (_, _, v), _ = qk_norm_rope.forward(
                qkv[:, 2:], *rest, heads=HEADS, view_v=True, impl="triton"
            )
            assert v.untyped_storage()._cdata == qkv.untyped_storage()._cdata
            assert v.shape == (2, 5 if text is None else 7, HEADS, 10)


@every_impl
def test_the_gradient_past_the_norm_is_added(impl):
    _, (x, scale, shift) = modulated_layer_norm_case(5, impl)
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    x, scale, shift = (t.detach().to(device) for t in (x, scale, shift))
    out, saved = modulated_layer_norm.forward(x, scale, shift, impl=impl)
    past, needs = (
        torch.linspace(-1, 1, x.numel(), device=device).view(x.shape),
        (True, False, False),
    )
    plain = modulated_layer_norm.backward(out.y, saved, needs, impl=impl)[0]
    added = modulated_layer_norm.backward(out.y, saved, needs, add_to=past, impl=impl)[0]
    torch.testing.assert_close(added, plain + past)


@every_impl
def test_the_gates_gradient_needs_y(impl):
    _, inputs = gated_residual_case(5, impl)
    x, gate, y = (t.detach().to(TRITON_DEVICE if impl == "triton" else "cpu") for t in inputs)
    out, saved = gated_residual.forward(x, gate, y, keep_y=False, impl=impl)
    assert saved[1] is None
    dx, dgate, dy = gated_residual.backward(out, saved, (True, False, True), impl=impl)
    assert dx is out
    assert dgate is None
    torch.testing.assert_close(dy, out * gate[:, None])


@every_impl
def test_codes_and_their_gradient(impl):
    """The gradient is that of the values, whether they were written or not."""
    _, (x,) = gelu_case(5, impl)
    x = x.detach().to(TRITON_DEVICE if impl == "triton" else "cpu")
    plain, saved = gelu.forward(x, impl=impl)
    coded, saved_too = gelu.forward(x, out="int8", impl=impl)
    assert coded.y is None
    expected = row_quant.row_quant_ref(plain.y, "int8")
    assert_same(coded.q, expected.q)
    assert_same(coded.q_scale, expected.scale)
    for kept, kept_too in zip(saved, saved_too, strict=True):
        assert torch.equal(kept, kept_too)


@pytest.mark.parametrize(
    ("weight", "scale", "suffice"),
    [(1.0, 1.0, True), (0.0, 1.0, False), (9.0, 1.0, False), (1.0, 1.2, False)],
)
def test_whether_outputs_suffice(monkeypatch, weight, scale, suffice):
    weights = torch.ones(4, 10)
    weights[3, 5] = weight
    angle = torch.linspace(0, 6, 35).view(7, 5)
    constants = (weights, angle.cos() * scale, angle.sin())
    assert qk_norm_rope.outputs_suffice(*constants) == suffice
    # and what a GPU is asked, there being no native module for it
    monkeypatch.setattr(dispatch, "HAS_NATIVE", False)
    assert qk_norm_rope.outputs_suffice(*constants) == suffice
