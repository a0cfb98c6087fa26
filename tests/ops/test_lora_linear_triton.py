"""`lora_linear` on Triton, in its interpreter where there is no GPU, beside its formula in fp64."""

import pytest
import torch
from lora_cases import CASES, as_codes, check, make_group
from op_cases import needs_triton
from op_checks import TRITON_DEVICE

from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.quant import QuantWeight

pytestmark = needs_triton
# every program of the interpreter takes its time: codes of other cases are in the kernels' own
# tests
CODED = [
    "one token, rank 1",
    "packed, odd ranks, one without",
    "apart",
    "side by side, but not in the kernels' unit",
]


@pytest.fixture(params=["library", "fused"])
def engine(request, monkeypatch):
    """Who takes wide products of floats on Triton."""
    from fluxfast_kernels.launch import WIDE_ENGINES

    monkeypatch.setitem(WIDE_ENGINES, "float", {"default": ((None, request.param),)})
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_on_floats(case, engine):
    check("triton", case, torch.float32)


@pytest.mark.parametrize("case", CODED)
@pytest.mark.parametrize("compute", ["int8", "e4m3"])
def test_on_codes(case, compute):
    check("triton", case, torch.float32, compute, stored=True)


@pytest.mark.parametrize("compute", ["int8", "e4m3"])
def test_weights_that_have_to_be_quantised(compute):
    check("triton", "side by side, but not in the kernels' unit", torch.float32, compute)


def test_transposed_copies_for_dgrad(transposes):
    check("triton", "apart", torch.float32, "int8", stored=True)
    assert len(transposes) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype, engine):
    check("triton", "packed, odd ranks, one without", dtype)


@pytest.mark.parametrize("compute", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_under_sixteen_bits(dtype, compute):
    check("triton", "apart", dtype, compute, stored=True)


def test_weights_and_adapters_of_another_dtype(engine):
    """fp32 ones under bf16 activations: cast as they are read."""
    check("triton", "packed, two adapters", torch.bfloat16, store=torch.float32)


@pytest.mark.parametrize("tokens", [9, 65])
def test_few_tokens_read_stored_codes_in_place(tokens, monkeypatch):
    """Up to the table's number of tokens, a product of values with codes decodes no weight."""
    decoded = []
    decode = QuantWeight.decode_into
    monkeypatch.setattr(
        QuantWeight, "decode_into", lambda self, out: (decoded.append(out), decode(self, out))
    )
    linears = as_codes(
        make_group(24, [32], [[]], torch.float32, device=TRITON_DEVICE), "int8", True
    )
    lora_linear(torch.randn(tokens, 24, device=TRITON_DEVICE), linears, "triton")
    assert len(decoded) == (tokens > 64)
