import numpy
import pytest
import torch
from op_cases import needs_triton
from op_checks import DTYPES, TRITON_DEVICE, randn

from fluxfast.ops import dispatch
from fluxfast.ops.row_quant import forward, row_quant, row_quant_ref
from fluxfast.ops.tensors import divide
from quant_cases import DividesAsAGpu, same_bytes

# half of a code's step, relative to the scale (int8) or, above the subnormals, to the value (e4m3)
HALF_STEP = {"int8": 0.5, "e4m3": 2.0**-4}


def rows(dtype=torch.float32, width=63):
    """Ordinary rows, one with an outlier, one of zeros, one too small to have a normal scale."""
    x = randn(6, width, grad=False)
    x[1, 5] = -400.0
    x[2] = 0.0
    x[3] *= 1e-38
    return x.to(dtype)


def test_int8_by_hand():
    """Halves go to even, the largest is always 127, and no code is -128."""
    x = torch.tensor(
        [
            [127.0, 0.5, 1.5, 2.5, -0.5, -126.5],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-254.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        ]
    )
    q, scale = row_quant_ref(x, "int8")
    assert q.tolist() == [[127, 0, 2, 2, 0, -126], [0] * 6, [-127, 1, 2, 2, 2, 3]]
    assert scale.tolist() == [1.0, 1.0, 2.0]


def test_e4m3_by_hand():
    # between 16 and 32 the step is 2, above 256 it is 32, and it is never below 2^-9
    q, scale = row_quant_ref(torch.tensor([[448.0, 17.0, 19.0, 300.0, -0.001, 0.0]]), "e4m3")
    assert q.float().tolist() == [[448.0, 16.0, 20.0, 288.0, -(2.0**-9), 0.0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("divisor", [127.0, 448.0])
def test_quotients_are_rounded_once_also_where_torch_takes_a_reciprocal(divisor):
    x = randn(1000, grad=False)
    exact = torch.from_numpy(x.numpy() / numpy.float32(divisor))
    assert torch.equal(divide(x, divisor), exact)
    with DividesAsAGpu():
        assert not torch.equal(x / divisor, exact)
        assert torch.equal(divide(x, divisor), exact)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_a_gpus_reference_gives_the_same_bytes(fmt):
    x = randn(100, 63, grad=False)
    expected = row_quant_ref(x, fmt)
    with DividesAsAGpu():
        found = row_quant_ref(x, fmt)
    assert all(same_bytes(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_error_is_half_a_step(fmt, dtype):
    x = rows(dtype)
    q, scale = row_quant(x, fmt, impl="ref")
    scale = scale[:, None].double()
    error = (q.double() * scale - x.double()).abs()
    # rounding the scale and the quotient to fp32 moves a value by less than 1e-4 of a step
    step = scale if fmt == "int8" else torch.maximum(x.double().abs(), 2.0**-6 * scale)
    assert (error <= HALF_STEP[fmt] * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_what_is_not_finite_shows_in_the_scale(fmt, value):
    x = rows()
    x[4, 3] = value
    assert row_quant_ref(x, fmt).scale.isfinite().tolist() == [True, True, True, True, False, True]


def test_col_scale_comes_first():
    x, col_scale = rows(), randn(63, grad=False).abs()
    got, expected = (
        row_quant(x, "int8", col_scale, impl="ref"),
        row_quant_ref(x * col_scale, "int8"),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_triton
@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_triton_gives_the_same_codes(poisoned, fmt, dtype, scaled):
    x = rows(dtype).to(TRITON_DEVICE)
    col_scale = randn(63, seed=9, grad=False).to(TRITON_DEVICE) if scaled else None
    expected = row_quant_ref(x, fmt, col_scale)
    wide = torch.nn.functional.pad(x, (2, 5))[:, 2:-5]
    for layout in (x, wide, x.t().contiguous().t(), x.unflatten(0, (3, 2))):
        quantized = row_quant(layout, fmt, col_scale, impl="triton")
        assert quantized.q.shape == layout.shape
        assert quantized.scale.shape == layout.shape[:-1]
        # as numbers: the interpreter loses the sign of a zero
        assert torch.equal(quantized.q.float().view(x.shape), expected.q.float())
        assert torch.equal(quantized.scale.flatten(), expected.scale)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 1000])
def test_native_gives_the_same_codes(poisoned, isa, fmt, dtype, width):
    x = rows(dtype, width) if width > 5 else randn(6, width, grad=False).to(dtype)
    for value in (float("nan"), float("inf")):
        x = torch.cat([x, torch.full((1, width), 2.0, dtype=dtype)])
        x[-1, width // 2] = value
    for col_scale in (None, randn(width, seed=9, grad=False)):
        expected = row_quant_ref(x, fmt, col_scale)
        finite = expected.scale.isfinite()
        for layout in (
            x,
            torch.nn.functional.pad(x, (2, 5))[:, 2:-5],
            x.t().contiguous().t(),
            x.unflatten(0, (4, 2)),
        ):
            q, scale = forward(layout, fmt, col_scale, impl="native")
            assert q.shape == layout.shape and scale.shape == layout.shape[:-1]
            assert torch.equal(q.view(x.shape)[finite].float(), expected.q[finite].float())
            torch.testing.assert_close(
                scale.flatten(), expected.scale, rtol=0, atol=0, equal_nan=True
            )


def test_nothing_to_quantise():
    for impl in ("ref", "native", "triton"):
        for shape in ((0, 5), (3, 0, 5)):
            q, scale = forward(torch.zeros(shape, device="cpu"), "int8", impl=impl)
            assert q.shape == shape and scale.shape == shape[:-1]


def test_codes_have_no_gradient():
    for impl in ("ref", "triton") if dispatch.HAS_TRITON else ("ref",):
        q, scale = row_quant(rows().to(TRITON_DEVICE).requires_grad_(), "int8", impl=impl)
        assert not q.requires_grad
        assert not scale.requires_grad


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected one of e4m3, int8; got 'int4'"):
        row_quant(rows(), "int4")
    with pytest.raises(ValueError, match=r"x \[6, 63\], col_scale \[6\]"):
        row_quant(rows(), "int8", torch.ones(6))
