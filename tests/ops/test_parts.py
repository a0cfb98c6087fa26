"""Raw calls that take the text's and the image's rows at once, beside the reference on each."""

import pytest
import torch
from op_cases import needs_triton
from op_checks import TRITON_DEVICE, randn
from test_raw_rows import assert_rows

from fluxfast.ops import gated_residual, gelu, modulated_layer_norm, row_quant
from fluxfast.ops.device import pretend
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import FORMATS, RowOutput
from support import relative_error

BATCH, TOKENS, WIDTH = 2, (3, 5), 12
PARTS = Parts(BATCH * TOKENS[0], BATCH)
ROWS = BATCH * sum(TOKENS)

every_out = pytest.mark.parametrize("out", ["same", "int8", "both-e4m3"])

# fp32 against fp64, with sums over a handful of rows: ten roundings of 6e-8
TOLERANCE = 1e-6


def rows(seed):
    """Rows of both parts, a slice of columns of a wider matrix, with a stride of no multiple."""
    return randn(ROWS, WIDTH + 5, seed=seed, grad=False).to(TRITON_DEVICE)[:, 2:-3]


def vectors(seed):
    """A vector a sample for each part, as chunks of the parts' modulation."""
    pair = (randn(BATCH, 3 * WIDTH, seed=seed + i, grad=False).to(TRITON_DEVICE) for i in (0, 50))
    text, image = (vector.chunk(3, dim=-1)[1] for vector in pair)
    return text, image


def factors(out):
    """col_scale for each part, where codes are asked for."""
    if out == "same":
        return None
    pair = (randn(WIDTH, 2, seed=seed, grad=False).abs() + 0.1 for seed in (90, 91))
    # every other number of a vector: the ops have to lay it out for the kernels
    text, image = (scale.to(TRITON_DEVICE)[:, 0] for scale in pair)
    return text, image


def own(part, operand):
    """One part's share of an operand or a result: rows as [B, S, …], in fp64 for the reference."""
    if operand is None:
        return None
    if isinstance(operand, tuple):
        return operand[part].double()
    half = operand[: PARTS.rows] if part == 0 else operand[PARTS.rows :]
    return half.unflatten(0, (BATCH, TOKENS[part])).double()


def assert_part(part, actual, expected, out, col_scale):
    """A part's share of a RowOutput is what the reference makes of its values in fp64."""
    half = slice(PARTS.rows) if part == 0 else slice(PARTS.rows, None)
    mine = RowOutput(*(None if t is None else t[half] for t in actual))
    scale = None if col_scale is None else col_scale[part]
    assert_rows(mine, expected.flatten(0, 1).float(), out, scale)


def wide_for(out):
    """A buffer of the rows' shape amid columns of sevens, where values are asked for."""
    if out in FORMATS:
        return None, None
    wide = torch.full((ROWS, WIDTH + 9), 7.0, device=TRITON_DEVICE)
    return wide, wide[:, 4:-5]


def assert_around(wide, into, output):
    """The values went to `into`, and nothing to its neighbours."""
    if wide is not None:
        assert output.y is into
        assert (wide[:, :4] == 7).all() and (wide[:, -5:] == 7).all()


@needs_triton
@every_out
def test_norm(poisoned, out):
    x, dy, past = rows(1), rows(2), rows(3)
    scale, shift = vectors(4), vectors(5)
    wide, into = wide_for(out)
    output, saved = modulated_layer_norm.forward(
        x, scale, shift, 1e-5, out=out, into=into, parts=PARTS, impl="triton"
    )
    assert_around(wide, into, output)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        grads = modulated_layer_norm.backward(
            dy, saved, needs, add_to=past, parts=PARTS, impl="triton"
        )
        assert [grad is not None for grad in grads] == list(needs)
        for part in (0, 1):
            args = [own(part, t) for t in (x, scale, shift)]
            expected, kept = modulated_layer_norm.forward(*args, 1e-5, impl="ref")
            assert_part(part, output, expected.y, out, None)
            wanted = modulated_layer_norm.backward(
                own(part, dy), kept, needs, add_to=own(part, past), impl="ref"
            )
            for grad, reference in zip(grads, wanted, strict=True):
                if grad is not None:
                    assert relative_error(own(part, grad), reference) < TOLERANCE


@needs_triton
@every_out
@pytest.mark.parametrize(("modulation", "keep"), [(False, False), (True, False), (True, True)])
def test_gated_residual_and_norm(poisoned, out, modulation, keep):
    residual, branch, dy, past = (rows(seed) for seed in range(1, 5))
    gate, scale, shift = (vectors(seed) for seed in range(5, 8))
    col_scale = factors(out)
    wide, into = wide_for(out)
    x, output, saved = modulated_layer_norm.forward_residual(
        residual, gate, branch, scale, shift,
        out=out, keep_branch=keep, into=into, parts=PARTS, impl="triton",
    )  # fmt: skip
    assert_around(wide, into, output)
    values = output.y
    if values is not None:
        output = output._replace(y=values.clone())
    dx, dbranch, sums = modulated_layer_norm.backward_residual(
        dy, saved, add_to=past, out=out, col_scale=col_scale, modulation=modulation, into=into,
        parts=PARTS, impl="triton",
    )  # fmt: skip
    assert_around(wide, into, dbranch)
    assert [t is not None for t in sums] == [modulation, modulation, keep]
    for part in (0, 1):
        args = [own(part, t) for t in (residual, gate, branch, scale, shift)]
        total, expected, kept = modulated_layer_norm.forward_residual(
            *args, keep_branch=keep, impl="ref"
        )
        assert relative_error(own(part, x), total) < TOLERANCE
        assert_part(part, output, expected.y, out, None)
        dtotal, dvalues, wanted = modulated_layer_norm.backward_residual(
            own(part, dy), kept, add_to=own(part, past), modulation=modulation, impl="ref"
        )
        assert relative_error(own(part, dx), dtotal) < TOLERANCE
        assert_part(part, dbranch, dvalues.y, out, col_scale)
        for grad, reference in zip(sums, wanted, strict=True):
            if grad is not None:
                assert relative_error(own(part, grad), reference) < TOLERANCE


@needs_triton
@every_out
@pytest.mark.parametrize("needs_gate", [False, True])
def test_gated_residual(poisoned, out, needs_gate):
    x, y, dout, gate, col_scale = rows(1), rows(2), rows(3), vectors(4), factors(out)
    total, saved = gated_residual.forward(x, gate, y, parts=PARTS, impl="triton")
    wide, into = wide_for(out)
    dy, dgate = gated_residual.backward_rows(
        dout, saved, out=out, col_scale=col_scale, needs_gate=needs_gate, into=into, parts=PARTS,
        impl="triton",
    )  # fmt: skip
    assert_around(wide, into, dy)
    plain = gated_residual.backward(dout, saved, (True, True, True), parts=PARTS, impl="triton")
    assert plain[0] is dout
    for part in (0, 1):
        args = [own(part, t) for t in (x, gate, y)]
        expected, kept = gated_residual.forward(*args, impl="ref")
        assert relative_error(own(part, total), expected) < TOLERANCE
        _, dgate_ref, dy_ref = gated_residual.backward(
            own(part, dout), kept, (True, True, True), impl="ref"
        )
        assert_part(part, dy, dy_ref, out, col_scale)
        assert relative_error(own(part, plain[2]), dy_ref) < TOLERANCE
        for grad in (plain[1], dgate) if needs_gate else (plain[1],):
            assert relative_error(own(part, grad), dgate_ref) < TOLERANCE


@needs_triton
@every_out
def test_gelus_gradient(poisoned, out):
    x, dy, col_scale = rows(1), rows(2), factors(out)
    wide, into = wide_for(out)
    dx = gelu.backward_rows(
        dy, (x,), out=out, col_scale=col_scale, into=into, parts=PARTS, impl="triton"
    )
    assert_around(wide, into, dx)
    for part in (0, 1):
        (expected,) = gelu.backward(own(part, dy), (own(part, x),), (True,), impl="ref")
        assert_part(part, dx, expected, out, col_scale)


@needs_triton
@pytest.mark.parametrize("fmt", list(FORMATS))
def test_codes(poisoned, fmt):
    x, col_scale = rows(1), factors(fmt)
    codes = row_quant.forward(x, fmt, col_scale, parts=PARTS, impl="triton")
    for part in (0, 1):
        assert_part(part, RowOutput(None, *codes), own(part, x), fmt, col_scale)


def made(x, y, scale, col_scale, parts):
    """A chain of all the ops with `parts`: the tensors that they make."""
    options = {"out": "both-int8", "parts": parts, "impl": "triton"}
    scaled = {**options, "col_scale": col_scale}
    total, rows_, saved = modulated_layer_norm.forward_residual(
        x, scale, y, scale, scale, keep_branch=True, **options
    )
    into = torch.empty(ROWS, WIDTH + 5, device=x.device)[:, 2:-3]
    dx, dbranch, sums = modulated_layer_norm.backward_residual(
        rows_.y, saved, modulation=True, add_to=x, into=into, **scaled
    )
    normed, kept = modulated_layer_norm.forward(dx, scale, scale, **options)
    grads = modulated_layer_norm.backward(y, kept, (True, True, False), parts=parts, impl="triton")
    added, gated = gated_residual.forward(x, scale, dx, parts=parts, impl="triton")
    dy, dgate = gated_residual.backward_rows(added, gated, needs_gate=True, **scaled)
    dh = gelu.backward_rows(dy.y, (x,), **scaled)
    codes = row_quant.forward(x, "int8", col_scale, parts=parts, impl="triton")
    pairs = (*sums, *grads[1:2], dgate)
    tensors = (total, *rows_, dx, *dbranch, *normed, *kept[:3], grads[0], added, *dy, *dh, *codes)
    return [*tensors, *(t for pair in pairs for t in pair)]


@needs_triton
def test_shapes_alone():
    """What the plan measures memory with: meta tensors, and no kernel asked for."""
    x, y, scale, col_scale = rows(1), rows(2), vectors(3), factors("int8")
    real = made(x, y, scale, col_scale, PARTS)
    meta = [t.to("meta") for t in (x, y, *scale, *col_scale)]
    with pretend("sm_90", on_launch=None):
        shapes = made(meta[0], meta[1], tuple(meta[2:4]), tuple(meta[4:]), PARTS)
    assert [(t.shape, t.dtype) for t in shapes] == [(t.shape, t.dtype) for t in real]
    assert all(t.is_meta for t in shapes)


@needs_triton
def test_one_part_at_a_time_elsewhere():
    x, scale = rows(1), vectors(2)
    with pytest.raises(AssertionError, match="only for impl='triton'"):
        gated_residual.forward(x, scale, x, parts=PARTS, impl="ref")
