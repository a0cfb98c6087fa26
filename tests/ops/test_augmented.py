"""Products with weight and adapters in one matrix, against the formula in fp64.

The GEMM is torch's; what fills the matrix and the adapters' thin products are Triton's kernels, in
the interpreter where there is no GPU.
"""

import gc
import weakref

import pytest
import torch
from lora_cases import CASES, TOLERANCES, as_codes, expected, leaves, make_group
from op_cases import needs_triton
from op_checks import TRITON_DEVICE

from augmented_cases import augmenting, in_place, poison_
from fluxfast.ops.linear import augmented
from fluxfast.ops.linear.group import LinearGroup, fill_in_place
from fluxfast.ops.row_quant import RowOutput
from support import relative_error
from toy_adapters import Diagonal

pytestmark = needs_triton
MORE_CASES = {
    "rank 5, one column": (9, 40, [16], [[5]], True),
    "some without an adapter": (17, 24, [16, 32, 16], [[], [3, 9], []], True),
    "FLUX's, packed": (63, 32, [16, 16, 16, 64], [[4]] * 4, True),
}


def both_ways(linears, tokens, dtype, *, seed=None, made_in_room=(True, True)):
    """y, dx and the gradients of all adapters; dy is written over y, as in a block."""
    group = LinearGroup(linears, dtype, impl="triton", dropout_seed=seed)
    n_in, n_out = linears[0].weight.shape[1], sum(p.weight.shape[0] for p in linears)
    g = torch.Generator().manual_seed(7)
    x, dy = (
        torch.randn(1, tokens, n, generator=g, dtype=torch.float64).to(TRITON_DEVICE, dtype)
        for n in (n_in, n_out)
    )
    x_room = group.new_input(1, tokens) if made_in_room[0] else None
    x_place = x.clone() if x_room is None else poison_(x_room).copy_(x)
    y_room = group.new_output(1, tokens) if made_in_room[1] else None
    rows = RowOutput(x_place, None, None)
    y, s = group.forward(rows, y_room)
    forward = y.clone()
    dx, grads = group.backward(y.copy_(dy) if y_room is not None else dy, rows, s)
    assert torch.equal(x_place, x) and (y_room is None or torch.equal(y_room, dy))
    return x, dy, [forward, dx, *(grad for of_adapter in grads for grad in of_adapter)]


def check(linears, tokens, dtype, **options):
    with torch.no_grad():
        x, dy, actual = both_ways(linears, tokens, dtype, **options)
    y, grads = expected(x, dy, linears, "same")
    for a, e in zip(actual, [y, *grads], strict=True):
        assert relative_error(a, e) < TOLERANCES[dtype]


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(case, dtype):
    tokens, n_in, outs, ranks, packed = {**CASES, **MORE_CASES}[case]
    linears = make_group(n_in, outs, ranks, dtype, packed=packed, device=TRITON_DEVICE)
    with augmenting() as taken:
        check(in_place(linears), tokens, dtype)
    # a group without adapters has nothing beside its weight
    assert taken == (["forward", "backward"] if any(ranks) else [])


@pytest.mark.parametrize("made_in_room", [(False, True), (True, False), (False, False)])
def test_what_no_room_was_made_for_is_never_written(made_in_room):
    """Slices of a wider tensor have the strides of a tensor with room."""
    linears = in_place(make_group(24, [16, 32], [[3], [5]], torch.float32, device=TRITON_DEVICE))
    with augmenting() as taken:
        check(linears, 9, torch.float32, made_in_room=made_in_room)
        assert len(taken) == sum(made_in_room)
        group = LinearGroup(linears, torch.float32, impl="triton")
        group.new_input(9)
        wide = torch.full((9, 24 + 8), 7.0, device=TRITON_DEVICE)
        group.forward(RowOutput(wide[:, :24], None, None))
        assert (wide == 7).all()


def test_room_for_more_ranks_than_there_are():
    linears = in_place(make_group(24, [16], [[3]], torch.float32, device=TRITON_DEVICE), rank=40)
    with augmenting() as taken:
        check(linears, 9, torch.float32)
    assert taken == ["forward", "backward"]


def test_more_ranks_than_there_is_room_for():
    linears = in_place(make_group(24, [16], [[9]], torch.float32, device=TRITON_DEVICE), rank=8)
    with augmenting() as taken:
        check(linears, 9, torch.float32)
    assert taken == []


@pytest.mark.parametrize("change", ["a weight apart", "another order", "not all of them"])
def test_weights_that_no_longer_live_there(change):
    linears = in_place(make_group(24, [16, 16], [[3], [3]], torch.float32, device=TRITON_DEVICE))
    if change == "a weight apart":
        linears[1] = linears[1]._replace(weight=linears[1].weight.clone())
    elif change == "another order":
        linears.reverse()
    else:
        linears.pop()
    with augmenting() as taken:
        check(linears, 9, torch.float32)
    assert taken == []


@pytest.mark.parametrize("stored", [None, "int8", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_decoded(stored, dtype):
    # more tokens than those up to which a product reads codes
    linears = make_group(24, [16, 32], [[3], [5]], dtype, device=TRITON_DEVICE)
    coded = as_codes(linears, stored, packed=True)
    # a tensor beside them is copied to the same scratch
    coded[1] = coded[1]._replace(weight=linears[1].weight)
    with augmenting() as taken:
        check(coded, 70, dtype)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_adapters_and_biases_of_another_dtype(other):
    linears = make_group(24, [16, 32], [[3], [5]], torch.float16, device=TRITON_DEVICE)
    stored = make_group(24, [16, 32], [[3], [5]], torch.float16, store=other, device=TRITON_DEVICE)
    linears = in_place([p._replace(weight=w.weight) for p, w in zip(stored, linears, strict=True)])
    with augmenting() as taken:
        check(linears, 9, torch.float16)
    assert taken == ["forward", "backward"]


def test_dropout():
    """Each adapter sees an x of its own, and dx can't have dS A from one GEMM."""
    linears = make_group(24, [16, 32], [[3], [5]], torch.float32, dropout=0.5, device=TRITON_DEVICE)
    linears[1] = linears[1]._replace(
        adapters=tuple(lora._replace(dropout=0.0) for lora in linears[1].adapters)
    )
    with torch.no_grad():
        _, _, wanted = both_ways(
            linears, 9, torch.float32, seed=torch.tensor(5, device=TRITON_DEVICE)
        )
        with augmenting() as taken:
            _, _, actual = both_ways(
                in_place(linears), 9, torch.float32, seed=torch.tensor(5, device=TRITON_DEVICE)
            )
    assert taken == ["forward"]
    for a, e in zip(actual, wanted, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


def test_adapters_beside_the_product():
    linears = make_group(24, [16, 32], [[3], [5]], torch.float32, device=TRITON_DEVICE)
    beside = Diagonal(*(torch.randn(n, device=TRITON_DEVICE) for n in ((24,), (32, 24))))
    with torch.no_grad():
        linears[1] = linears[1]._replace(adapters=(beside, *linears[1].adapters))
        _, _, wanted = both_ways(linears, 9, torch.float32)
        with augmenting() as taken:
            weights = in_place([p._replace(adapters=p.adapters[-1:]) for p in linears])
            linears = [p._replace(weight=w.weight) for p, w in zip(linears, weights, strict=True)]
            _, _, actual = both_ways(linears, 9, torch.float32)
    assert taken == ["forward", "backward"]
    for a, e in zip(actual, wanted, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


def test_a_group_is_filled_once_a_direction(monkeypatch):
    linears = in_place(make_group(24, [16], [[3]], torch.float32, device=TRITON_DEVICE))
    launches = []
    from fluxfast_kernels import copy_matrices as kernels

    monkeypatch.setattr(kernels, "launch", lambda *args, **_: launches.append(args[0]))
    with augmenting():

        def use(**options):
            group = LinearGroup(linears, torch.float32, impl="triton")
            fill_in_place([group], **options)
            group.new_input(9)
            group.new_output(9)
            return len(launches)

        # an optimiser may have written by an address; only a backward knows that it did not
        assert [use(), use(), use(filled=True)] == [1, 2, 2]


def test_new_values_of_the_adapters_are_seen():
    linears = in_place(make_group(24, [16], [[3]], torch.float32, device=TRITON_DEVICE))
    with augmenting(), torch.no_grad():
        check(linears, 9, torch.float32)
        for leaf in leaves(linears):
            leaf.data.mul_(-2)
        check(linears, 9, torch.float32)


def test_memory_goes_with_the_weights():
    made = augmented.make_room([torch.zeros(16, 24)], 3)
    reference = augmented.StorageWeakRef(made[0].untyped_storage())
    assert not reference.expired()
    del made
    gc.collect()
    assert reference.expired()


def test_an_s_that_was_kept():
    """It outlives x, and gives the same y for an x that is computed again."""
    linears = in_place(make_group(24, [16, 32], [[3], [2]], torch.float32, device=TRITON_DEVICE))
    ys = []
    s = None
    with augmenting() as taken, torch.no_grad():
        for _ in range(2):
            group = LinearGroup(linears, torch.float32, impl="triton")
            x = group.new_input(9)
            x.copy_(torch.randn(9, 24, generator=torch.Generator().manual_seed(1)))
            y, s = group.forward(RowOutput(x, None, None), kept=s)
            ys.append(y)
    assert taken == ["forward", "forward"] and torch.equal(*ys)
    assert s.untyped_storage().nbytes() == s.nbytes


def test_a_group_s_memory_goes_with_it():
    """Its decoded weights, too: nothing of it refers back to it."""
    linears = as_codes(
        make_group(24, [16], [[3]], torch.float32, device=TRITON_DEVICE), None, packed=True
    )
    with augmenting():
        group = LinearGroup(linears, torch.float32, impl="triton")
        group.new_input(9)
        group.new_output(9)
        gc.disable()
        try:
            reference = weakref.ref(group)
            del group
            assert reference() is None
        finally:
            gc.enable()
