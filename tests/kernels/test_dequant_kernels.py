"""The storage formats' kernels: exactly the bytes and values of `fluxfast.quant`'s references."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, widen

from fluxfast.ops import dispatch
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast_kernels.dequant_rows import dequant_rows, quantize_both_ways
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


@every_format
@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("shape", [(63, 63), (1, 1), (33, 320), (70, 129), (12, 192)])
def test_codes_in_both_orders(format, fmt, shape):
    """A launch that writes codes transposed as well writes those of one that does not, and nothing
    beside them.
    """
    weight = hard() if shape == (12, 192) else heavy_tailed(*shape)
    stored = QuantWeight(format, format.quantize(weight.to(DEVICE), impl="ref"), shape)
    expected = stored.codes(fmt, impl="triton")
    rows, cols = shape
    q, scale = torch.empty_like(expected.q), torch.empty_like(expected.scale)
    wide = torch.empty(cols, rows + 7, dtype=q.dtype, device=DEVICE)
    untouched = wide.clone()
    stored.decode_into(q, scale, "triton", transposed=wide[:, 3 : 3 + rows])
    assert same_bytes(q, expected.q) and same_bytes(scale, expected.scale)
    assert same_bytes(wide[:, 3 : 3 + rows], expected.q.T)
    for beside in (slice(None, 3), slice(3 + rows, None)):
        assert same_bytes(wide[:, beside], untouched[:, beside])


def side_by_side(format, *shapes):
    """Weights of a format whose parts lie one after the other in memory."""
    parts = [format.quantize(gaussian(*shape, seed=n).to(DEVICE)) for n, shape in enumerate(shapes)]
    whole = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
    places = {
        name: tensor.split([len(each[name]) for each in parts]) for name, tensor in whole.items()
    }
    return [
        QuantWeight(format, {name: places[name][n] for name in whole}, shape)
        for n, shape in enumerate(shapes)
    ]


@every_format
@pytest.mark.parametrize("fmt", [None, "int8", "e4m3"])
def test_weights_that_lie_side_by_side_in_one_launch(format, fmt):
    """Each keeps what is its own: nf4's offset, int2's global scale."""
    # nf4's rows have to fill whole nested blocks
    last = 32 if format.name == "nf4" else 7
    first, *others = side_by_side(format, (32, 512), (64, 512), (last, 512))
    whole = first.joined(others, codes=fmt is not None, impl="triton")
    members = [first, *others]
    if fmt is None:
        values = torch.empty(whole.shape, dtype=torch.bfloat16, device=DEVICE)
        whole.decode_into(values, impl="triton")
        assert same_bytes(values, torch.cat([w.to(values.dtype, impl="ref") for w in members]))
        return
    q = torch.empty(whole.shape, dtype=CODES[fmt][0], device=DEVICE)
    scale, transposed = torch.empty(len(q), device=DEVICE), torch.empty_like(q.T.contiguous())
    expected = [w.codes(fmt, impl="ref") for w in members]
    for copy in (None, transposed):
        whole.decode_into(q, scale, "triton", transposed=copy)
        assert same_bytes(q, torch.cat([codes.q for codes in expected]))
        assert same_bytes(scale, torch.cat([codes.scale for codes in expected]))
    assert same_bytes(transposed, q.T)


@every_format
def test_weights_that_one_launch_can_not_write(format):
    first, second = side_by_side(format, (32, 512), (7, 512))
    apart = QuantWeight.of(gaussian(7, 512).to(DEVICE), format)
    other = QuantWeight.of(
        gaussian(7, 512).to(DEVICE), FORMATS["int4" if format.name != "int4" else "int8"]
    )
    for rest in ([apart], [other], [second, apart]):
        assert first.joined(rest, codes=False, impl="triton") is None
    # on a GPU the native module does not decode every format
    for impl in ("ref", "native") if dispatch.HAS_NATIVE and DEVICE == "cpu" else ("ref",):
        assert first.joined([second], codes=False, impl=impl) is None
    if format.name == "nf4":
        first, second = side_by_side(format, (24, 512), (7, 512))
        assert first.joined([second], codes=False, impl="triton") is None


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63, 63), (1, 1), (33, 320), (12, 192)])
def test_floats_become_codes_in_both_orders(fmt, dtype, shape):
    """Codes and scales are those of `row_quant`'s formula, also of rows that lie apart."""
    weight = hard() if shape == (12, 192) else gaussian(*shape)
    weight = widen(weight.to(DEVICE).clamp(-6e4, 6e4).to(dtype))
    expected_q, expected_scale = row_quant_ref(weight.float(), fmt)
    q, scale = torch.empty_like(expected_q), torch.empty_like(expected_scale)
    transposed = torch.empty(shape[::-1], dtype=q.dtype, device=DEVICE)
    quantize_both_ways(weight, q, scale, transposed)
    assert same_bytes(q, expected_q) and same_bytes(scale, expected_scale)
    assert same_bytes(transposed, expected_q.T)


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
