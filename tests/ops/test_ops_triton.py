"""The public ops on Triton, in its interpreter where there is no GPU, against their references in
fp64; and output modes.
"""

import pytest
import torch
from op_cases import (
    CASES,
    PLAIN_CASES,
    QUANTIZING_CASES,
    every_impl,
    gelu_case,
    modulated_layer_norm_case,
    needs_triton,
    qk_norm_rope_case,
)
from op_checks import DTYPES, TOLERANCES, TRITON_DEVICE, assert_matches_fp64, saved_shapes

from fluxfast.ops.gelu import gelu, gelu_ref
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.row_quant import row_quant_ref
from support import assert_same

every_out = pytest.mark.parametrize("out", ["int8", "e4m3", "both-int8", "both-e4m3"])


def make(case, tokens, dtype=torch.float32):
    """The op on Triton, its reference, and inputs: `dtype` where a gradient is asked for, else as
    they come.
    """
    op, inputs = case(tokens, "triton")
    inputs = [
        x.detach()
        .to(TRITON_DEVICE, dtype if x.requires_grad else x.dtype)
        .requires_grad_(x.requires_grad)
        for x in inputs
    ]
    return op, case(tokens, "ref")[0], inputs


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(poisoned, case, tokens, dtype):
    op, ref, inputs = make(case, tokens, dtype)
    assert_matches_fp64(op, ref, inputs, TOLERANCES[dtype])


def columns(x):
    """x as columns of a wider tensor: contiguous rows, at a distance."""
    return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]


def transposed(x):
    """x with its first dimension innermost."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@needs_triton
@pytest.mark.parametrize("layout", [columns, transposed])
@pytest.mark.parametrize("case", CASES)
def test_strided_inputs_and_gradients(poisoned, case, layout):
    op, ref, inputs = make(case, 5)

    def strided(op):
        def run(*inputs):
            outs = op(*(layout(x) if x.requires_grad else x for x in inputs))
            return tuple(layout(out) for out in (outs if isinstance(outs, tuple) else (outs,)))

        return run

    assert_matches_fp64(strided(op), strided(ref), inputs)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_only_the_gradients_asked_for(case):
    op, ref, inputs = make(case, 4)
    learned = [i for i, x in enumerate(inputs) if x.requires_grad]
    for one in learned:
        some = [
            x.detach().requires_grad_(i == one) if i in learned else x for i, x in enumerate(inputs)
        ]
        assert_matches_fp64(op, ref, some)


@needs_triton
@pytest.mark.parametrize("case", PLAIN_CASES + QUANTIZING_CASES)
def test_no_tokens(case):
    op, ref, inputs = make(case, 0)
    assert_matches_fp64(op, ref, inputs)


@needs_triton
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 2, 5)])
def test_gelu_of_any_shape(shape):
    x = (
        torch.linspace(-3, 3, max(1, torch.Size(shape).numel()), device=TRITON_DEVICE)
        .reshape(shape)
        .requires_grad_()
    )
    assert_matches_fp64(lambda x: gelu(x, impl="triton"), gelu_ref, [x])


@needs_triton
def test_what_backward_keeps():
    op, _, inputs = make(gelu_case, 5)
    assert saved_shapes(lambda: op(*inputs)) == [(2, 5, 12)]
    op, _, inputs = make(modulated_layer_norm_case, 5)
    assert saved_shapes(lambda: op(*inputs)) == [(2, 5), (2, 5), (2, 5, 12), (2, 12)]
    op, _, inputs = make(qk_norm_rope_case, 5)
    # with the reciprocal RMS, all of its inputs, and nothing else
    assert saved_shapes(lambda: op(*inputs)) == sorted(
        [(2, 7, 2, 3), *(tuple(x.shape) for x in inputs)]
    )


def quantizing_ops(impl):
    """What an op with an output mode makes of x, alone and as `out` says."""

    def modulated(x, **kwargs):
        scale, shift = x[:, 0].detach().float(), x[:, 1].detach().float()
        return modulated_layer_norm(x, scale, shift, impl=impl, **kwargs)

    return [lambda x, **kwargs: gelu(x, impl=impl, **kwargs), modulated]


def make_rows(device, dtype=torch.float32):
    """Rows with an outlier and rows of zeros among them."""
    x = torch.randn(2, 5, 63, generator=torch.Generator().manual_seed(3))
    x[0, 3, 17] = 300.0
    x[1, 4] = 0.0
    return x.to(device, dtype)


@every_impl
@every_out
def test_codes_are_those_of_the_values(poisoned, impl, out):
    x = make_rows(TRITON_DEVICE if impl == "triton" else "cpu").requires_grad_()
    for op in quantizing_ops(impl):
        values = op(x)
        y, q, q_scale = op(x, out=out)
        expected = row_quant_ref(values.detach(), out.removeprefix("both-"))
        assert_same(q, expected.q)
        assert_same(q_scale, expected.scale)
        assert not q.requires_grad
        assert not q_scale.requires_grad
        if out.startswith("both"):
            assert_same(y, values)
            assert y.requires_grad
        else:
            assert y is None


@pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_quantized_before_they_are_rounded(impl, dtype):
    """The error against fp64 is half a code's step, without what rounding the values to 16 bits
    would add.
    """
    x = make_rows(TRITON_DEVICE if impl == "triton" else "cpu", dtype)
    for op, exact in zip(quantizing_ops(impl), quantizing_ops("ref"), strict=True):
        q, q_scale = op(x, out="int8")[1:]
        error = (q.double() * q_scale[..., None].double() - exact(x.double())).abs()
        assert (error <= 0.5001 * q_scale[..., None]).all()


@every_impl
def test_unknown_output(impl):
    x = make_rows(TRITON_DEVICE if impl == "triton" else "cpu")
    for op in quantizing_ops(impl):
        with pytest.raises(ValueError, match=r"out: expected one of .* got 'fp8'"):
            op(x, out="fp8")
