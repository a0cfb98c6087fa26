"""Text and image in one launch of a row-wise kernel, beside fp64 and beside a launch a part."""

import pytest
import torch
from kernel_cases import DTYPES, randn, widen

from fluxfast_kernels.gated_residual import gated_residual_bwd, gated_residual_fwd
from fluxfast_kernels.gelu import gelu_bwd
from fluxfast_kernels.modulated_layer_norm import (
    modulated_layer_norm_bwd,
    modulated_layer_norm_fwd,
)
from fluxfast_kernels.parts import Parts
from fluxfast_kernels.row_programs import RowPrograms
from fluxfast_kernels.row_quant import row_quant
from support import assert_same, bound, relative_error

# samples, tokens of a sample in each part, width; a part may be empty, and 17 tokens end inside a
# program that sums 16
SIZES = [
    (1, (1, 63), 63),
    (2, (17, 1), 96),
    (3, (2, 5), 1000),
    (1, (0, 4), 63),
    (2, (3, 0), 1000),
    (2, (0, 0), 63),
]
OUTS = ["same", "int8", "both-e4m3"]


class Case:
    """Rows of two parts, and what belongs to the parts, in `dtype`."""

    def __init__(self, batch, tokens, width, dtype):
        self.batch, self.tokens, self.width, self.dtype = batch, tokens, width, dtype
        self.parts = Parts(batch * tokens[0], batch)
        self.seed = 0

    def rows(self, scale=1.0):
        """A matrix of rows, as a slice of columns of a wider one."""
        self.seed += 1
        count = self.batch * sum(self.tokens)
        return widen((scale * randn(count, self.width, seed=self.seed)).to(self.dtype))

    def vectors(self):
        """A vector a sample, in two parts that lie differently far apart."""
        self.seed += 1
        text = randn(self.batch, 3 * self.width, seed=self.seed).to(self.dtype)
        image = randn(self.batch, 4 * self.width, seed=self.seed + 50).to(self.dtype)
        return text[:, self.width : 2 * self.width], image[:, 3 * self.width :]

    def col_scale(self, out):
        self.seed += 1
        if out == "same":
            return None
        scales = randn(2, self.width, seed=self.seed, scale=0.1).abs().float() + 0.01
        return scales[0], scales[1]

    def of_part(self, part, operand):
        """One part's tensor of an operand, rows as [B, S, D]."""
        if operand is None:
            return None
        if isinstance(operand, tuple):
            return operand[part]
        rows = operand[: self.parts.rows] if part == 0 else operand[self.parts.rows :]
        return rows.unflatten(0, (self.batch, self.tokens[part]))


every_size = pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)


def assert_parts_equal(case, both, of_each):
    """What one launch made is what a launch a part made."""
    for part, alone in enumerate(of_each):
        for name in alone._fields:
            expected, actual = getattr(alone, name), getattr(both, name)
            assert (actual is None) == (expected is None), name
            if actual is not None:
                assert_same(case.of_part(part, actual), expected, (name, part))


def norm(x, scale, shift, gate=None, branch=None):
    if gate is not None:
        x = x + gate[:, None] * branch
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x, y * (1 + scale[:, None]) + shift[:, None]


@every_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_beside_fp64(dtype, batch, tokens, width):
    case = Case(batch, tokens, width, dtype)
    x, branch, dy, past = case.rows(3), case.rows(), case.rows(), case.rows()
    scale, shift, gate = case.vectors(), case.vectors(), case.vectors()
    out = modulated_layer_norm_fwd(x, scale, shift, gate=gate, branch=branch, parts=case.parts)
    grads = modulated_layer_norm_bwd(
        dy, out.x, scale, out.mean, out.rstd, add_to=past, modulation=True, gate=gate,
        branch=branch, parts=case.parts,
    )  # fmt: skip
    assert out.y.shape == grads.dx.shape == x.shape and out.mean.shape == x.shape[:1]
    for part in (0, 1):
        exact = [
            case.of_part(part, t).double().requires_grad_() for t in (x, scale, shift, gate, branch)
        ]
        total, y = norm(*exact)
        dys = [case.of_part(part, t).double() for t in (dy, past)]
        expected = torch.autograd.grad((y, total), exact, dys)
        # x is rounded before it is normalised, so its rounding counts twice
        assert relative_error(case.of_part(part, out.x), total) < bound(dtype)
        assert relative_error(case.of_part(part, out.y), y) < 2 * bound(dtype)
        actual = (grads.dx, grads.dscale, grads.dshift, grads.dgate, grads.dbranch)
        for grad, reference in zip(actual, expected, strict=True):
            assert relative_error(case.of_part(part, grad), reference) < 2 * bound(dtype)


@every_size
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("gated", [False, True])
def test_layer_norm_is_that_of_a_launch_a_part(batch, tokens, width, out, gated):
    case = Case(batch, tokens, width, torch.float16)
    x, scale, shift = case.rows(3), case.vectors(), case.vectors()
    gate, branch = (case.vectors(), case.rows()) if gated else (None, None)

    def forward(part=None, parts=None):
        own = (lambda t: t) if parts else (lambda t: case.of_part(part, t))
        return modulated_layer_norm_fwd(
            own(x), own(scale), own(shift), gate=own(gate), branch=own(branch), out=out, parts=parts
        )

    both = forward(parts=case.parts)
    assert_parts_equal(case, both, [forward(0), forward(1)])

    dy, past, col_scale = case.rows(), case.rows(), case.col_scale(out)

    def backward(modulation, part=None, parts=None):
        own = (lambda t: t) if parts else (lambda t: case.of_part(part, t))
        mean, rstd = (own(t).contiguous() for t in (both.mean, both.rstd))
        return modulated_layer_norm_bwd(
            own(dy), own(x), own(scale), mean, rstd, add_to=own(past), modulation=modulation,
            gate=own(gate), branch=own(branch), out=out, col_scale=own(col_scale), parts=parts,
        )  # fmt: skip

    for modulation in (False, True):
        alone = [backward(modulation, part) for part in (0, 1)]
        assert_parts_equal(case, backward(modulation, parts=case.parts), alone)


@every_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_residual_beside_fp64(dtype, batch, tokens, width):
    case = Case(batch, tokens, width, dtype)
    x, y, dout, gate = case.rows(), case.rows(), case.rows(), case.vectors()
    out = gated_residual_fwd(x, gate, y, parts=case.parts)
    grads = gated_residual_bwd(dout, gate, y, parts=case.parts)
    for part in (0, 1):
        exact = [case.of_part(part, t).double().requires_grad_() for t in (gate, y)]
        expected = case.of_part(part, x).double() + exact[0][:, None] * exact[1]
        dgate, dy = torch.autograd.grad(expected, exact, case.of_part(part, dout).double())
        assert relative_error(case.of_part(part, out), expected) < bound(dtype)
        assert relative_error(case.of_part(part, grads.dy), dy) < bound(dtype)
        assert relative_error(grads.dgate[part], dgate) < bound(dtype)


@every_size
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("needs_gate", [False, True])
def test_gated_residual_is_that_of_a_launch_a_part(batch, tokens, width, out, needs_gate):
    case = Case(batch, tokens, width, torch.float16)
    dout, gate, col_scale = case.rows(), case.vectors(), case.col_scale(out)
    y = case.rows() if needs_gate else None
    both = gated_residual_bwd(dout, gate, y, out=out, col_scale=col_scale, parts=case.parts)
    alone = [
        gated_residual_bwd(
            *(case.of_part(part, t) for t in (dout, gate, y)),
            out=out,
            col_scale=case.of_part(part, col_scale),
        )
        for part in (0, 1)
    ]
    assert_parts_equal(case, both, alone)


@every_size
@pytest.mark.parametrize("out", ["int8", "both-e4m3"])
def test_codes_of_gelus_gradient(batch, tokens, width, out):
    case = Case(batch, tokens, width, torch.float16)
    x, dy, col_scale = case.rows(), case.rows(), case.col_scale(out)
    both = gelu_bwd(dy, x, out=out, col_scale=col_scale, parts=case.parts)
    alone = [
        gelu_bwd(*(case.of_part(part, t) for t in (dy, x)), out=out, col_scale=col_scale[part])
        for part in (0, 1)
    ]
    assert_parts_equal(case, both, alone)


@every_size
@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_codes_of_a_matrix(batch, tokens, width, fmt):
    case = Case(batch, tokens, width, torch.float16)
    x, col_scale = case.rows(), case.col_scale(fmt)
    q, q_scale = row_quant(x, fmt, col_scale=col_scale, parts=case.parts)
    for part, rows in enumerate((x[: case.parts.rows], x[case.parts.rows :])):
        mine = slice(case.parts.rows) if part == 0 else slice(case.parts.rows, None)
        expected, scale = row_quant(rows, fmt, col_scale=col_scale[part])
        assert torch.equal(q[mine].float(), expected.float()) and torch.equal(q_scale[mine], scale)


def test_flux_width_in_bf16():
    case = Case(1, (2, 3), 3072, torch.bfloat16)
    x, scale, shift = case.rows(), case.vectors(), case.vectors()
    out = modulated_layer_norm_fwd(x, scale, shift, out="both-int8", parts=case.parts)
    for part in (0, 1):
        _, y = norm(*(case.of_part(part, t).double() for t in (x, scale, shift)))
        assert relative_error(case.of_part(part, out.y), y) < bound(torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_no_program_takes_rows_of_two_samples(monkeypatch, rows):
    """Whatever a launch table says, sums stay those of a sample."""
    from fluxfast_kernels import gated_residual, modulated_layer_norm

    numbers = {"BLOCK": 64, "num_warps": 1, "ROWS": rows}
    for module in (gated_residual, modulated_layer_norm):
        monkeypatch.setattr(module, "row_numbers", lambda *_: numbers)
    case = Case(3, (5, 17), 63, torch.float32)
    dout, y, gate, mean = case.rows(), case.rows(), case.vectors(), randn(66, seed=9).float()
    rstd = mean.abs() + 1
    grads = gated_residual_bwd(dout, gate, y, parts=case.parts)
    norms = modulated_layer_norm_bwd(dout, y, gate, mean, rstd, parts=case.parts, modulation=True)
    plain = modulated_layer_norm_bwd(dout, y, gate, mean, rstd, parts=case.parts)
    assert_same(norms.dx, plain.dx)
    xhat = (y - mean[:, None]) * rstd[:, None]
    for part in (0, 1):
        mine, other, normed = (case.of_part(part, t).double() for t in (dout, y, xhat))
        assert relative_error(case.of_part(part, grads.dy), mine * gate[part][:, None]) < 1e-6
        assert relative_error(grads.dgate[part], (mine * other).sum(1)) < 1e-6
        assert relative_error(norms.dshift[part], mine.sum(1)) < 1e-6
        assert relative_error(norms.dscale[part], (mine * normed).sum(1)) < 1e-6


def test_programs_of_two_parts():
    programs = RowPrograms(batch=2, tokens=(5, 33), rows=16)
    assert programs.grid == (2 * (1 + 3), 1) and programs.sizes == (5, 33, 2)
    assert RowPrograms(batch=2, tokens=(33,), rows=16).grid == (3, 2)


def test_rows_that_are_no_multiple_of_the_samples_are_refused():
    for rows, total in ((3, 8), (4, 7), (10, 8)):
        with pytest.raises(AssertionError):
            Parts(rows, 2).tokens(total)


def test_pairs_are_for_parts_alone():
    case = Case(1, (2, 3), 63, torch.float32)
    x, gate = case.rows(), case.vectors()
    for rows, vectors, parts in ((x[None], gate, None), (x, gate[0], case.parts)):
        with pytest.raises(AssertionError):
            gated_residual_fwd(rows, vectors, rows, parts=parts)
