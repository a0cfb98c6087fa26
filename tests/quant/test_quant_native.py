"""The native quantisers: the reference's bytes from every instruction set, any threads, dtype,
shape and stride.
"""

import pytest
import torch

from fluxfast.ops import dispatch
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.linear import QuantLinear
from quant_cases import AWKWARD, assert_shares_a_scratch, gaussian, hard, heavy_tailed, same_bytes
from support import for_thread_counts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is 0x77 in every byte, so that a byte nobody wrote shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_cpu and tensor.numel():
            tensor.view(torch.uint8).fill_(0x77)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def assert_equals_ref(format, weight):
    shape = tuple(weight.shape)
    parts, expected = format.quantize(weight, impl="native"), format.quantize(weight, impl="ref")
    assert list(parts) == list(expected)
    for name in expected:
        assert same_bytes(parts[name], expected[name]), name
    for dtype in (*DTYPES, torch.float64):
        out = QuantWeight(format, expected, shape).to(dtype, impl="native")
        assert same_bytes(out, QuantWeight(format, expected, shape).to(dtype, impl="ref")), dtype
    for fmt in ("int8", "e4m3"):
        codes, reference = (
            QuantWeight(format, expected, shape).codes(fmt, impl=impl) for impl in ("native", "ref")
        )
        assert same_bytes(codes.q, reference.q) and same_bytes(codes.scale, reference.scale), fmt


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*AWKWARD, (3, 4160)])
def test_bytes_are_the_references(isa, poisoned, format, dtype, shape):
    assert_equals_ref(format, heavy_tailed(*shape, seed=shape[1]).to(dtype))


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_rows(isa, poisoned, format, dtype):
    # fp16 ends at 65504
    weight = hard(200).clamp(-6e4, 6e4).to(dtype)
    assert_equals_ref(format, weight)
    assert_equals_ref(format, weight[:, :64])


@every_format
def test_every_number_of_sixteen_bits(isa, format):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(128, 512)
    for dtype in (torch.bfloat16, torch.float16):
        weight = bits.view(dtype).clone()
        weight[~weight.isfinite()] = 1
        if format.name == "nf4" and dtype == torch.bfloat16:
            # their mean has to be finite
            weight = weight.clamp(-1e35, 1e35)
        assert_equals_ref(format, weight)


@every_format
def test_strides(isa, format):
    wide = gaussian(40, 150)
    for weight in (
        wide.T,
        wide[:, 3:70],
        wide[::3],
        wide[:, ::2],
        wide[:1].expand(6, 150),
        wide[:, :1],
        wide.double(),
    ):
        assert_equals_ref(format, weight)


@every_format
def test_same_for_any_thread_count(format):
    if not dispatch.HAS_NATIVE:
        pytest.skip("the native module was not built")
    weight = gaussian(61, 1088).bfloat16()

    def run():
        parts = format.quantize(weight, impl="native")
        values = QuantWeight(format, parts, (61, 1088)).to(torch.float32, impl="native")
        return [
            *parts.values(),
            values,
            *QuantWeight(format, parts, (61, 1088)).codes("int8", impl="native"),
        ]

    results = for_thread_counts(run)
    for other in results[1:]:
        assert all(same_bytes(a, b) for a, b in zip(results[0], other, strict=True))


@every_format
def test_linears_share_a_scratch(isa, format):
    assert_shares_a_scratch(format, "cpu", "native")


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (4, 62), (2, 31)])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(isa, format, dtype, place, value):
    weight = gaussian(5, 63).to(dtype)
    weight[place] = value
    with pytest.raises(ValueError, match=rf"holds {value} at \[{place[0]}, {place[1]}\]"):
        format.quantize(weight, impl="native")


@every_format
def test_auto_is_native_and_an_impl_that_cannot_is_refused(format, monkeypatch):
    weight = gaussian(3, 64)
    if dispatch.HAS_NATIVE:
        monkeypatch.setattr(type(format), "quantize_ref", None)
        format.quantize(weight)
    with pytest.raises(ValueError, match=f"{format.name}.quantize: impl must be"):
        format.quantize(weight, impl="cuda")
    monkeypatch.setattr(dispatch, "HAS_NATIVE", False)
    with pytest.raises(
        ValueError,
        match=f"{format.name}.quantize: impl='native' can't do this call: the native module",
    ):
        format.quantize(weight, impl="native")
    with pytest.raises(
        ValueError, match=f"{format.name}.dequantize: impl='native' can't do this call"
    ):
        QuantWeight(format, format.empty((3, 64)), (3, 64)).to(torch.float32, impl="native")


@every_format
def test_a_model_of_fake_tensors(format):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = QuantLinear(3072, 9216, format=format, compute_dtype=torch.bfloat16)
        x = torch.empty(7, 3072, dtype=torch.bfloat16, requires_grad=True)
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert y.shape == (7, 9216) and dx.shape == x.shape and y.dtype == dx.dtype == torch.bfloat16
