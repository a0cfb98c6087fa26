"""The storage formats' kernels: exactly the bytes and values of `fluxfast.quant`'s references."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, widen

from fluxfast.quant import FORMATS, QuantWeight
from fluxfast_kernels.dequant_rows import dequant_rows
from fluxfast_kernels.quantize_e4m3 import quantize_e4m3
from quant_cases import assert_shares_a_scratch, gaussian, hard, heavy_tailed, same_bytes

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
SHAPES = [(1, 64), (1, 1), (5, 63), (3, 1000), (7, 24), (2, 129), (5, 320)]
# every shape in fp32, and two of them in the other types: how a type is read and written depends on
# no shape
TYPED_SHAPES = [
    *((shape, torch.float32) for shape in SHAPES),
    *(
        (shape, dtype)
        for shape in [(5, 63), (3, 1000)]
        for dtype in DTYPES
        if dtype != torch.float32
    ),
]


def assert_quantizes_as_ref(format, weight):
    parts, expected = format.quantize(weight, impl="triton"), format.quantize(weight, impl="ref")
    assert list(parts) == list(expected)
    for name in expected:
        assert same_bytes(parts[name], expected[name]), name


@every_format
@pytest.mark.parametrize(("shape", "dtype"), TYPED_SHAPES)
def test_bytes_are_the_references(format, dtype, shape):
    assert_quantizes_as_ref(format, heavy_tailed(*shape, seed=shape[1]).to(DEVICE, dtype))


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_hard_rows(format, dtype):
    # fp16 ends at 65504
    assert_quantizes_as_ref(format, hard(200).clamp(-6e4, 6e4).to(DEVICE, dtype))


@every_format
def test_strided_weights(format):
    wide = gaussian(4, 150).to(DEVICE)
    for weight in (
        wide[:, :5].T,
        wide[:, 3:70],
        wide[::3],
        wide.double(),
        widen(wide[:, :64].bfloat16()),
    ):
        assert_quantizes_as_ref(format, weight)


def test_every_number_of_sixteen_bits_in_e4m3():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(256, 256)
    weight = bits.view(torch.bfloat16).clone()
    weight[~weight.isfinite()] = 1
    assert_quantizes_as_ref(FORMATS["fp8_e4m3"], weight.to(DEVICE))


@every_format
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 62), (2, 31)])
def test_a_weight_that_is_not_finite_is_refused(format, value, place):
    weight = gaussian(5, 63).to(DEVICE)
    weight[place] = value
    with pytest.raises(ValueError, match=rf"holds {value} at \[{place[0]}, {place[1]}\]"):
        format.quantize(weight, impl="triton")


@every_format
@pytest.mark.parametrize(("shape", "dtype"), [*TYPED_SHAPES, ((5, 63), torch.float64)])
def test_values_are_the_references(format, shape, dtype):
    parts = format.quantize(heavy_tailed(*shape).to(DEVICE), impl="ref")
    values = QuantWeight(format, parts, shape).to(dtype, impl="triton")
    assert same_bytes(values, QuantWeight(format, parts, shape).to(dtype, impl="ref"))


@every_format
@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("shape", [*SHAPES, (12, 192)])
def test_codes_are_the_references(format, fmt, shape):
    weight = hard() if shape == (12, 192) else heavy_tailed(*shape)
    parts = format.quantize(weight.to(DEVICE), impl="ref")
    codes, expected = (
        QuantWeight(format, parts, shape).codes(fmt, impl=impl) for impl in ("triton", "ref")
    )
    assert same_bytes(codes.q, expected.q) and same_bytes(codes.scale, expected.scale)


def test_all_e4m3_codes():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    # 0x7F and 0xFF are NaN, which no quantiser writes
    codes = torch.cat([codes[:127], codes[128:255]])[None]
    values = torch.empty(codes.shape, device=DEVICE)
    dequant_rows(codes.view(torch.float8_e4m3fn), torch.ones(1, device=DEVICE), values)
    assert same_bytes(values, codes.view(torch.float8_e4m3fn).float())
    back, scale = quantize_e4m3(values)
    assert scale.item() == 1 and same_bytes(back.view(torch.uint8), codes)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_rows_wider_than_a_program(format, dtype):
    # three programs to a row where values are wanted, one that is not full where codes are; the
    # second one's rows begin within nf4's blocks
    for shape in ((2, 4160), (2, 4104)):
        parts = format.quantize(gaussian(*shape).to(DEVICE))
        if dtype == torch.bfloat16:
            values = QuantWeight(format, parts, shape).to(dtype, impl="triton")
            assert same_bytes(values, QuantWeight(format, parts, shape).to(dtype, impl="ref"))
        else:
            fmt = "int8" if dtype == torch.int8 else "e4m3"
            codes, expected = (
                QuantWeight(format, parts, shape).codes(fmt, impl=impl)
                for impl in ("triton", "ref")
            )
            assert same_bytes(codes.q, expected.q) and same_bytes(codes.scale, expected.scale)


@every_format
def test_linears_share_a_scratch(format):
    assert_shares_a_scratch(format, DEVICE, "triton")
