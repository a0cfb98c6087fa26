"""The quantisers and decoders of the storage formats: the bytes and the values of `fluxfast.quant`'s references, exactly."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, widen

from fluxfast.quant import FORMATS, nf4
from fluxfast_kernels.dequant_int4 import dequant_int4
from fluxfast_kernels.dequant_nf4 import dequant_nf4
from fluxfast_kernels.dequant_rows import dequant_rows
from fluxfast_kernels.quantize_e4m3 import quantize_e4m3
from quant_cases import gaussian, hard, heavy_tailed

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
SHAPES = [(1, 64), (1, 1), (5, 63), (3, 1000), (7, 24), (2, 129), (5, 320)]


def same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    )


def assert_quantizes_as_ref(format, weight):
    parts, expected = format.quantize(weight, impl="triton"), format.quantize(weight, impl="ref")
    assert list(parts) == list(expected)
    for name in expected:
        assert same_bytes(parts[name], expected[name]), name


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
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
    for weight in (wide[:, :5].T, wide[:, 3:70], wide[::3], wide.double(), widen(wide[:, :64].bfloat16())):
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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_are_the_references(format, shape, dtype):
    parts = format.quantize(heavy_tailed(*shape).to(DEVICE), impl="ref")
    values = format.dequantize(parts, shape, dtype, impl="triton")
    assert same_bytes(values, format.dequantize(parts, shape, dtype, impl="ref"))


@every_format
@pytest.mark.parametrize("shape", [*SHAPES, (12, 192)])
def test_int8_is_the_references(format, shape):
    weight = hard() if shape == (12, 192) else heavy_tailed(*shape)
    parts = format.quantize(weight.to(DEVICE), impl="ref")
    codes, scale = format.to_int8(parts, shape, impl="triton")
    expected, expected_scale = format.to_int8(parts, shape, impl="ref")
    assert same_bytes(codes, expected) and same_bytes(scale, expected_scale)


def test_all_e4m3_codes():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    # 0x7F and 0xFF are NaN, which no quantiser writes
    codes = torch.cat([codes[:127], codes[128:255]])[None]
    values, _ = dequant_rows(codes.view(torch.float8_e4m3fn), torch.ones(1, device=DEVICE), torch.float32)
    assert same_bytes(values, codes.view(torch.float8_e4m3fn).float())
    back, scale = quantize_e4m3(values)
    assert scale.item() == 1 and same_bytes(back.view(torch.uint8), codes)


def test_outputs_go_where_they_are_wanted():
    # rows of a scratch that several linears share
    shape = (6, 128)
    codes = torch.full((10, 128), 77, dtype=torch.int8, device=DEVICE)
    scales, values = torch.zeros(10, device=DEVICE), torch.zeros(10, 128, dtype=torch.bfloat16, device=DEVICE)
    parts = FORMATS["int4"].quantize(gaussian(*shape).to(DEVICE))
    dequant_int4(**parts, cols=128, dtype=torch.int8, out=codes[2:8], out_scale=scales[2:8])
    dequant_int4(**parts, cols=128, out=values[2:8])
    expected, expected_scale = FORMATS["int4"].to_int8(parts, shape)
    assert torch.equal(codes[2:8], expected) and torch.equal(scales[2:8], expected_scale)
    assert torch.equal(values[2:8], FORMATS["int4"].dequantize(parts, shape, torch.bfloat16))
    assert (codes[:2] == 77).all() and (codes[8:] == 77).all() and not scales[8:].any() and not values[:2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_nf4_rows_wider_than_a_program(dtype):
    # three programs to a row where values are wanted, one that is not full where codes are
    shape, device = (2, 4160), torch.device(DEVICE)
    parts = FORMATS["nf4"].quantize(gaussian(*shape).to(DEVICE))
    out, out_scale = dequant_nf4(**parts, shape=shape, tables=(nf4.code(device), nf4.absmax_code(device)), dtype=dtype)
    if dtype == torch.int8:
        expected, expected_scale = FORMATS["nf4"].to_int8(parts, shape, impl="ref")
        assert same_bytes(out, expected) and same_bytes(out_scale, expected_scale)
    else:
        assert out_scale is None and same_bytes(out, FORMATS["nf4"].dequantize(parts, shape, dtype, impl="ref"))
