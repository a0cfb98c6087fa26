"""dgrad on transposed copies of W's codes, as on sm_90: the bits that it gives without them, and no
launch that transposes where a copy is there.
"""

import pytest
import torch
from lora_cases import as_codes, make_group
from op_cases import needs_triton
from op_checks import TRITON_DEVICE

from fluxfast.ops.linear import transposed_codes
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.quant import FORMATS, QuantWeight

pytestmark = needs_triton

TOKENS, WIDTH, OUTS = 17, 63, [32, 16, 48]


def bases(stored: str, packed: bool) -> list[LinearParams]:
    """Three linears whose weights are stored in a format, or "float32"; `packed`: side by side."""
    linears = make_group(
        WIDTH, OUTS, [[3], [], [5]], torch.float32, packed=packed, device=TRITON_DEVICE
    )
    if stored in CODES:
        return as_codes(linears, stored, packed)
    if stored in FORMATS:
        return [p._replace(weight=QuantWeight.of(p.weight, FORMATS[stored])) for p in linears]
    return linears


def backward(linears: list[LinearParams], compute: str, *, dgrad: bool, again: bool = False):
    """dx and the adapters' gradients; `again`: forward runs on the same group first."""
    group = LinearGroup(linears, torch.float32, compute=compute, impl="triton", dgrad=dgrad)
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(TOKENS, n, generator=g).to(TRITON_DEVICE) for n in (WIDTH, sum(OUTS)))
    rows = group.as_input(x)
    s = group.forward(rows)[1] if again else group.down(rows)
    dx, grads = group.backward(dy, rows, s)
    assert dx is not None
    return [dx, *(t for of_adapter in grads for t in of_adapter)]


@pytest.mark.parametrize("compute", CODES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stored", ["int8", "e4m3", "int4", "nf4", "int2", "float32"])
def test_the_same_bits_with_and_without(stored, packed, compute, transposes):
    linears = bases(stored, packed)
    expected = backward(linears, compute, dgrad=False)
    # one launch for a group whose codes lie side by side, as those do that are decoded
    together = packed or stored != compute
    assert len(transposes) == (1 if together else len(OUTS))
    if stored == compute:
        give_copies(linears, compute, packed)
    transposes.clear()
    for again in (False, True):
        actual = backward(linears, compute, dgrad=True, again=again)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not transposes


def give_copies(linears: list[LinearParams], compute: str, packed: bool) -> None:
    codes = [p.weight.codes(compute).q for p in linears]
    copies = torch.cat(codes).T.contiguous().split(OUTS, dim=1)
    for q, copy in zip(codes, copies, strict=True):
        # of products of their own each is rounded, so copies lie apart where codes do
        transposed_codes.remember(q, copy if packed else copy.contiguous())


def test_forward_writes_codes_in_one_order(transposes, monkeypatch):
    decode, orders = QuantWeight.decode_into, []
    monkeypatch.setattr(
        QuantWeight,
        "decode_into",
        lambda self, *out, **options: orders.append(options) or decode(self, *out, **options),
    )
    linears = bases("int4", True)
    group = LinearGroup(linears, torch.float32, compute="int8", impl="triton")
    group.forward(group.as_input(torch.randn(TOKENS, WIDTH, device=TRITON_DEVICE)))
    assert orders and not any(orders)
    backward(linears, "int8", dgrad=True)
    assert all("transposed" in options for options in orders[len(OUTS) :])


def test_a_copy_counts_as_long_as_its_codes_are_what_they_were():
    codes = torch.arange(12, dtype=torch.int8).view(3, 4)
    assert transposed_codes.copy_of(codes) is None
    transposed_codes.remember(codes, codes.T.contiguous())
    assert torch.equal(transposed_codes.copy_of(codes), codes.T)
    # another tensor over the same memory is another matter
    assert transposed_codes.copy_of(codes[:]) is None
    codes[0, 0] = 5
    assert transposed_codes.copy_of(codes) is None
    transposed_codes.remember(codes, codes.T.contiguous())
    transposed_codes.forget(codes)
    assert transposed_codes.copy_of(codes) is None
    transposed_codes.forget(codes)


def test_neighbouring_copies_come_as_one():
    codes = [torch.full((n, 4), n, dtype=torch.int8) for n in (3, 1, 2)]
    whole = torch.cat(codes).T.contiguous()
    for q, copy in zip(codes, whole.split([3, 1, 2], dim=1), strict=True):
        transposed_codes.remember(q, copy)
    (joined,) = transposed_codes.copies_of(codes)
    assert torch.equal(joined, whole) and joined.data_ptr() == whole.data_ptr()
    # in another order they are no neighbours, and a missing one leaves none
    apart = transposed_codes.copies_of(codes[::-1])
    assert [copy.shape[1] for copy in apart] == [2, 1, 3]
    assert transposed_codes.copies_of([*codes, torch.zeros(1, 4, dtype=torch.int8)]) is None
