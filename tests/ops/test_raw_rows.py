"""Gradients as dgrad and packed buffers want them: codes of dx·col_scale, values in a slice of a
wider buffer; fused norms.
"""

import pytest
import torch
from op_cases import HEADS, TXT, every_impl, gelu_case, modulated_layer_norm_case, qk_norm_rope_case
from op_checks import TRITON_DEVICE, randn

from fluxfast.ops import gated_residual, gelu, modulated_layer_norm, qk_norm_rope
from fluxfast.ops.row_quant import FORMATS, RowOutput, row_quant_ref
from support import assert_same, relative_error

every_output = pytest.mark.parametrize("out", ["same", "int8", "e4m3", "both-int8", "both-e4m3"])

# codes are those of the values before they are rounded; an implementation that computes those in
# another order may land on the other side of a rounding, which costs one code of 127, or a step of
# e4m3
CODE_STEP = {"int8": 1 / 127, "e4m3": 2**-3}


def on_device(impl, *tensors):
    return [t.detach().to(TRITON_DEVICE if impl == "triton" else "cpu") for t in tensors]


def assert_rows(actual, expected, out, col_scale=None):
    """Values and codes that `out` asks for, and nothing else."""
    assert (actual.y is None) == (out in FORMATS) and (actual.q is None) == (out == "same")
    if actual.y is not None:
        assert relative_error(actual.y, expected) <= 2e-6
    if actual.q is not None:
        fmt = out.removeprefix("both-")
        wanted = row_quant_ref(expected, fmt, col_scale)
        assert actual.q.is_contiguous() and actual.q.dtype == wanted.q.dtype
        torch.testing.assert_close(actual.q_scale, wanted.scale, rtol=2e-6, atol=0)
        differ = (actual.q.float() - wanted.q.float()).abs() > 0
        assert differ.float().mean() < 0.02
        step = (
            actual.q_scale[..., None]
            * wanted.q.float().abs().clamp_min(127 if fmt == "int8" else 2**-6)
            * CODE_STEP[fmt]
        )
        values = [
            codes.float() * scale[..., None]
            for codes, scale in ((actual.q, actual.q_scale), wanted)
        ]
        assert ((values[0] - values[1]).abs() <= 1.001 * step).all()


@every_impl
@every_output
def test_gelu_behind_a_prefix(impl, out):
    x, prefix = on_device(impl, gelu_case(5, impl)[1][0], randn(2, 5, 7, seed=4))
    rows, saved = gelu.forward(x, prefix=prefix, out=out, impl=impl)
    assert_rows(rows, torch.cat((prefix, gelu.gelu_ref(x)), dim=-1), out)
    assert len(saved) == 1 and saved[0] is x


def buffer_in(wide):
    """A slice of columns of `wide`, which is as wide as needed for what is asked of it."""
    return wide[..., 9:-4]


def wide_like(x, cols=12):
    return torch.full((*x.shape[:-1], cols + 13), 7.0, device=x.device)


@every_impl
@pytest.mark.parametrize("out", ["same", "both-int8"])
def test_values_in_a_wider_buffer(impl, out):
    """Every op that takes `into` writes there what it else returns, and nothing beside it."""
    _, (x, scale, shift) = modulated_layer_norm_case(5, impl)
    x, scale, shift, y, gate, prefix = on_device(
        impl, x, scale, shift, randn(2, 5, 12, seed=8), randn(2, 12, seed=9), randn(2, 5, 7)
    )
    options = {"out": out, "impl": impl}
    _, _, saved = modulated_layer_norm.forward_residual(x, gate, y, scale, shift, **options)

    def calls(into, into_joint):
        norm, _ = modulated_layer_norm.forward(x, scale, shift, **options, into=into())
        _, gated, _ = modulated_layer_norm.forward_residual(
            x, gate, y, scale, shift, **options, into=into()
        )
        _, dbranch, _ = modulated_layer_norm.backward_residual(y, saved, **options, into=into())
        dy, _ = gated_residual.backward_rows(x, (gate, None), **options, into=into())
        activated, _ = gelu.forward(x, **options, into=into())
        joined, _ = gelu.forward(x, prefix=prefix, **options, into=into_joint())
        target = into()
        flat_target = None if target is None else target.flatten(0, 1)
        flat, _ = gelu.forward(x.flatten(0, 1), **options, into=flat_target)
        return norm, gated, dbranch, dy, activated, joined, flat

    buffers = []

    def buffer(cols):
        buffers.append(wide_like(x, cols))
        return buffer_in(buffers[-1])

    written = calls(lambda: buffer(12), lambda: buffer(19))
    for actual, expected in zip(written, calls(lambda: None, lambda: None), strict=True):
        for mine, theirs in zip(actual, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert_same(mine, theirs)
    starts = {buffer_in(wide).data_ptr() for wide in buffers}
    assert {output.y.data_ptr() for output in written} <= starts
    for wide in buffers:
        assert (wide[..., :9] == 7).all() and (wide[..., -4:] == 7).all()


@every_impl
@every_output
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 2, 12)])
def test_gelu_of_other_shapes_than_the_models(impl, out, shape):
    x, dy = on_device(impl, randn(*shape), randn(*shape, seed=1))
    rows, _ = gelu.forward(x, out=out, impl=impl)
    assert_rows(rows, gelu.gelu_ref(x), out)
    expected = gelu.backward(dy.double(), (x.double(),), [True], impl="ref")[0].float()
    assert_rows(gelu.backward_rows(dy, (x,), out=out, impl=impl), expected, out)


@every_impl
@every_output
def test_gelu_gradient_as_rows(impl, out):
    x, dy, col_scale = on_device(
        impl, randn(2, 5, 12), randn(2, 5, 12, seed=1), randn(12, seed=2).abs() + 0.1
    )
    scale = None if out == "same" else col_scale
    expected = gelu.backward(dy.double(), (x.double(),), [True], impl="ref")[0].float()
    rows = gelu.backward_rows(dy, (x,), out=out, col_scale=scale, impl=impl)
    assert_rows(rows, expected, out, scale)
    if out in FORMATS:
        return
    wide = torch.full((2, 5, 30), 7.0, device=x.device)
    rows = gelu.backward_rows(dy, (x,), out=out, col_scale=scale, into=wide[..., 9:21], impl=impl)
    assert rows.y.data_ptr() == wide[..., 9:].data_ptr()
    assert_rows(rows, expected, out, scale)
    assert (wide[..., :9] == 7).all() and (wide[..., 21:] == 7).all()


@every_impl
@every_output
def test_gelu_gradient_and_its_prefix(impl, out):
    """dy of [prefix | gelu(x)] as a product gives it: the prefix's part comes out apart."""
    x, dy, col_scale = on_device(
        impl, randn(2, 5, 12), randn(2, 5, 19, seed=1), randn(12, seed=2).abs() + 0.1
    )
    options = {"out": out, "col_scale": None if out == "same" else col_scale, "impl": impl}
    wide = torch.full((2, 5, 20), 7.0, device=x.device)
    rows = gelu.backward_rows(dy, (x,), dprefix=wide[..., 4:11], **options)
    plain = gelu.backward_rows(dy[..., 7:], (x,), **options)
    for mine, theirs in zip(rows, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_same(mine, theirs)
    assert torch.equal(wide[..., 4:11], dy[..., :7])
    assert (wide[..., :4] == 7).all() and (wide[..., 11:] == 7).all()


@every_impl
@every_output
@pytest.mark.parametrize("needs_gate", [False, True])
def test_gated_residual_gradient_as_rows(impl, out, needs_gate):
    dout, y, gate = on_device(impl, randn(2, 5, 12), randn(2, 5, 12, seed=1), randn(2, 12, seed=2))
    (col_scale,) = on_device(impl, randn(12, seed=3).abs() + 0.1)
    scale = None if out == "same" else col_scale
    rows, dgate = gated_residual.backward_rows(
        dout, (gate, y), out=out, col_scale=scale, needs_gate=needs_gate, impl=impl
    )
    assert_rows(rows, dout * gate[:, None], out, scale)
    assert (dgate is not None) == needs_gate
    if needs_gate:
        assert relative_error(dgate, (dout.double() * y.double()).sum(1)) < 2e-6


@every_impl
@pytest.mark.parametrize("keep_outputs", [False, True])
def test_qk_norm_rope_gradient_into_wider_buffers(impl, keep_outputs):
    _, inputs = qk_norm_rope_case(5, impl)
    qkv, txt_qkv, *constants = on_device(impl, *inputs)
    outs, saved = qk_norm_rope.forward(
        qkv, txt_qkv, *constants, heads=HEADS, keep_outputs=keep_outputs, impl=impl
    )
    douts = on_device(impl, *(randn(*out.shape, seed=i) for i, out in enumerate(outs)))
    expected = qk_norm_rope.backward(douts, saved, (True, True), s_txt=TXT, impl=impl)
    for given in ((True, True), (True, False), (False, True)):
        wide = [
            torch.full((2, tokens, qkv.shape[2] + 11), 7.0, device=qkv.device)
            for tokens in (5, TXT)
        ]
        slices = [w[..., 4:-7] for w in wide]
        dqkv, dtxt_qkv = (s if use else None for s, use in zip(slices, given, strict=True))
        actual = qk_norm_rope.backward_rows(
            douts, saved, s_txt=TXT, dqkv=dqkv, dtxt_qkv=dtxt_qkv, impl=impl
        )
        for grad, reference, target, w, use in zip(
            actual[:2], expected, slices, wide, given, strict=True
        ):
            assert_same(grad, reference)
            assert (grad is target) == use
            assert (w[..., :4] == 7).all() and (w[..., -7:] == 7).all()


@every_impl
@pytest.mark.parametrize("out", ["both-int8", "both-e4m3"])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_qk_norm_rope_gradient_as_codes(impl, out, text, scaled):
    """One tensor of codes: the text's rows of both samples, then the image's."""
    _, inputs = qk_norm_rope_case(5, impl)
    qkv, txt_qkv, *constants = on_device(impl, *inputs)
    if not text:
        txt_qkv, constants[0], constants[3] = None, constants[0][:2], constants[3][TXT:]
    s_txt = TXT if text else 0
    outs, saved = qk_norm_rope.forward(qkv, txt_qkv, *constants, heads=HEADS, impl=impl)
    douts = on_device(impl, *(randn(*o.shape, seed=i) for i, o in enumerate(outs)))
    scales = on_device(impl, *(randn(qkv.shape[-1], seed=i).abs() + 0.1 for i in (4, 5)))
    col_scale = None
    if scaled:
        col_scale = tuple(scales) if text else scales[1]
    made = qk_norm_rope.backward_rows(
        douts, saved, s_txt=s_txt, out=out, col_scale=col_scale, impl=impl
    )
    assert qk_norm_rope.backward_rows(douts, saved, s_txt=s_txt, impl=impl).codes is None
    exact = qk_norm_rope.backward_rows(
        [d.double() for d in douts],
        [t if t is None or not t.is_floating_point() else t.double() for t in saved],
        s_txt=s_txt,
        impl="ref",
    )
    parts = [made.dqkv.flatten(0, 1)]
    parts = [made.dtxt_qkv.flatten(0, 1), *parts] if text else parts
    wanted = [exact.dtxt_qkv.flatten(0, 1), exact.dqkv.flatten(0, 1)][-len(parts) :]
    starts = [0, 2 * TXT] if text else [0]
    for start, values, expected, scale in zip(
        starts, parts, wanted, scales[-len(parts) :], strict=True
    ):
        rows = slice(start, start + len(values))
        q, q_scale = (t[rows] for t in made.codes)
        assert_rows(RowOutput(values, q, q_scale), expected.float(), out, scale if scaled else None)
    assert len(made.codes.q) == len(made.codes.scale) == sum(map(len, parts))


@every_impl
@every_output
def test_gated_residual_and_norm_in_one(impl, out):
    _, inputs = modulated_layer_norm_case(5, impl)
    residual, scale, shift, branch, gate = on_device(
        impl, *inputs, randn(2, 5, 12, seed=8), randn(2, 12, seed=9)
    )
    x, rows, saved = modulated_layer_norm.forward_residual(
        residual, gate, branch, scale, shift, 1e-5, out=out, impl=impl
    )
    assert relative_error(x, residual.double() + gate[:, None].double() * branch.double()) < 2e-7
    assert_rows(
        rows,
        modulated_layer_norm.modulated_layer_norm_ref(x.double(), scale, shift, 1e-5).float(),
        out,
    )
    _, kept = modulated_layer_norm.forward(x, scale, shift, 1e-5, impl=impl)
    assert saved[0] is x and saved[4] is gate and saved[5] is None
    for mine, theirs in zip(saved[:4], kept, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_impl
@every_output
@pytest.mark.parametrize(
    ("modulation", "keep_branch"), [(False, False), (True, False), (True, True)]
)
def test_gradients_of_gated_residual_and_norm(impl, out, modulation, keep_branch):
    """Against autograd through both ops in fp64, `past` being the gradient that reaches x past the
    norm.
    """
    _, inputs = modulated_layer_norm_case(5, impl)
    tensors = on_device(impl, *inputs, randn(2, 5, 12, seed=8), randn(2, 12, seed=9))
    dy, past, col_scale = on_device(
        impl, randn(2, 5, 12, seed=3), randn(2, 5, 12, seed=4), randn(12, seed=5).abs() + 0.1
    )
    col_scale = None if out == "same" else col_scale
    residual, scale, shift, branch, gate = tensors
    leaves = [t.double().requires_grad_() for t in tensors]
    x = gated_residual.gated_residual_ref(leaves[0], leaves[4], leaves[3])
    y = modulated_layer_norm.modulated_layer_norm_ref(x, leaves[1], leaves[2])
    expected = torch.autograd.grad((y, x), leaves, (dy.double(), past.double()))

    args = {"keep_branch": keep_branch, "impl": impl}
    _, _, saved = modulated_layer_norm.forward_residual(
        residual, gate, branch, scale, shift, **args
    )
    dx, dbranch, sums = modulated_layer_norm.backward_residual(
        dy, saved, add_to=past, out=out, col_scale=col_scale, modulation=modulation, impl=impl
    )
    assert relative_error(dx, expected[0]) < 2e-6
    assert_rows(dbranch, expected[3].float(), out, col_scale)
    for grad, wanted, reference in zip(
        sums, (modulation, modulation, keep_branch), (*expected[1:3], expected[4]), strict=True
    ):
        assert (grad is not None) == wanted
        if grad is not None:
            assert relative_error(grad, reference) < 2e-6
    plain, _, _ = modulated_layer_norm.backward_residual(dy, saved, impl=impl)
    torch.testing.assert_close(plain + past, dx)


@every_impl
def test_raw_rows_compile_whole(impl):
    """As in a block's backward under torch.compile: one graph, buffers written in it, and eager's
    numbers.
    """
    _, inputs = modulated_layer_norm_case(5, impl)
    residual, scale, shift, branch, gate, dy = on_device(
        impl, *inputs, *(randn(2, 5, 12, seed=8),), randn(2, 12, seed=9), randn(2, 5, 12)
    )

    def chain(residual, gate, branch, scale, shift, dy):
        x, rows, saved = modulated_layer_norm.forward_residual(
            residual, gate, branch, scale, shift, out="both-int8", keep_branch=True, impl=impl
        )
        options = {"out": "both-int8", "col_scale": scale[0], "impl": impl}
        dx, dbranch, sums = modulated_layer_norm.backward_residual(
            dy, saved, modulation=True, add_to=dy, **options
        )
        wide = torch.zeros(2, 5, 30, device=x.device)
        dh = gelu.backward_rows(dx, (x,), into=wide[..., 7:19], **options)
        return x, *rows, dx, *dbranch, *sums, dh.q, dh.q_scale, wide

    arguments = (residual, gate, branch, scale, shift, dy)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")(*arguments)
        for actual, expected in zip(compiled, chain(*arguments), strict=True):
            torch.testing.assert_close(actual, expected)
