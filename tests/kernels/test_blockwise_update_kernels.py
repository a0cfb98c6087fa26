"""The fused AdamW and Lion with states in 8 bits or fp32: their formulas in plain torch."""

import pytest
import torch
from kernel_cases import DEVICE, programs_backwards, randn

from fluxfast.ops.blockwise_update import code_maps, encode, in_blocks, update_ref
from fluxfast_kernels.blockwise_update import States, blockwise_table, blockwise_update
from fluxfast_kernels.update_tables import gradient_table
from support import bound

HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
# one element, around one block of 256 and one program of four, and many programs
SIZES = [1, 63, 255, 256, 257, 1000, 1024, 4097]
FORMULAS = ["adamw", "lion"]
STEP = 3


def off_boundary(values, dtype, shift):
    """A copy of the values that begins `shift` elements into other memory full of sevens."""
    buffer = torch.full((values.numel() + shift + 1,), 7, dtype=dtype, device=DEVICE)
    view = buffer[shift : shift + values.numel()]
    view.copy_(values)
    return view


class Case:
    """Parameters, gradients and states of all sizes, in memory of their own."""

    def __init__(self, formula, bits, dtype=torch.float32, *, grad_dtype=None, shift=0):
        self.formula, self.bits = formula, bits
        self.maps = code_maps(torch.device(DEVICE))
        numbers = range(2 if formula == "adamw" else 1)
        self.params, self.grads, self.kept, self.scales = [], [], ([], []), ([], [])
        for seed, size in enumerate(SIZES):
            self.params.append(off_boundary(randn(size, seed=seed), dtype, shift))
            grad = randn(size, seed=50 + seed, scale=0.1)
            self.grads.append(off_boundary(grad, grad_dtype or dtype, shift))
            for i in numbers:
                values = randn(size, seed=100 + 50 * i + seed, scale=0.01).float()
                values = values.square() if i == 1 else values
                if bits == 8:
                    codes, scales = encode(in_blocks(values), self.maps[i, 1])
                    values = codes.flatten()[:size]
                    self.scales[i].append(off_boundary(scales, torch.float32, shift))
                state_dtype = torch.uint8 if bits == 8 else torch.float32
                self.kept[i].append(off_boundary(values, state_dtype, shift))
        none = [None] * len(SIZES)
        self.states = States(*((each or none) for each in (*self.kept, *self.scales)))

    def read(self, i):
        """A state's numbers, for each parameter."""
        if self.bits == 32:
            return [kept.double() for kept in self.kept[i]]
        return [
            self.maps[i, 0].double()[kept.int()]
            * scales.double().repeat_interleave(256)[: kept.numel()]
            for kept, scales in zip(self.kept[i], self.scales[i], strict=True)
        ]

    def run(self):
        table = blockwise_table(self.params, self.states)
        grads = gradient_table(table, self.grads)
        blockwise_update(self.formula, table, grads, self.maps, step=STEP, **HYPER)
        return self

    def everything(self):
        return [*self.params, *(t for each in (*self.kept, *self.scales) for t in each)]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("formula", FORMULAS)
def test_it_is_the_formula(formula, bits, dtype, shift):
    case = Case(formula, bits, dtype, shift=shift)
    count = 2 if formula == "adamw" else 1
    params = [p.double() for p in case.params]
    states = [list(each) for each in zip(*(case.read(i) for i in range(count)), strict=True)]
    for p, grad, state in zip(params, case.grads, states, strict=True):
        update_ref(formula, p, grad.double(), state, HYPER, STEP)
    case.run()
    for p, exact in zip(case.params, params, strict=True):
        # one rounding to bf16, which the interpreter cuts off, or a few in fp32
        rtol = bound(dtype) if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(p.double(), exact, rtol=rtol, atol=1e-6)
    for i in range(count):
        for place, actual in enumerate(case.read(i)):
            exact = states[place][i]
            if bits == 32:
                torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-7)
                continue
            codes, scales = encode(in_blocks(exact.float()), case.maps[i, 1])
            # fp32 sums of two terms in another order
            torch.testing.assert_close(case.scales[i][place], scales, rtol=1e-6, atol=0)
            off = (case.kept[i][place].int() - codes.flatten()[: exact.numel()].int()).abs()
            # about equally near to two codes
            assert off.max() <= 1 and off.count_nonzero() <= max(1, off.numel() / 200)
    for t in case.everything():
        around = torch.tensor([], dtype=t.dtype, device=DEVICE).set_(t.untyped_storage())
        assert (around[[*range(shift), -1]] == 7).all()


@pytest.mark.parametrize("formula", FORMULAS)
def test_gradients_may_have_another_dtype(formula):
    exact = Case(formula, 8, grad_dtype=torch.bfloat16)
    other = Case(formula, 8)
    other.grads = [g.float() for g in exact.grads]
    exact.run(), other.run()
    assert all(map(torch.equal, exact.everything(), other.everything()))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("formula", FORMULAS)
def test_the_same_bits_in_any_order_of_programs(formula, bits, monkeypatch):
    first = Case(formula, bits).run().everything()
    if DEVICE == "cpu":
        with programs_backwards():
            again = Case(formula, bits).run().everything()
        assert all(map(torch.equal, first, again))
    monkeypatch.setattr(
        "fluxfast_kernels.blockwise_update.BLOCKWISE_LAUNCH", {"default": {"ROWS": 1}}
    )
    assert all(map(torch.equal, first, Case(formula, bits).run().everything()))


def test_zeros_stay_zeros_and_what_is_no_number_stays_in_its_block():
    case = Case("adamw", 8)
    for t in (*case.grads, *case.scales[0], *case.scales[1]):
        t.zero_()
    case.grads[-1][300] = float("nan")
    case.run()
    for i in range(2):
        assert all((values == 0).all() for values in case.read(i)[:-1])
        assert (case.read(i)[-1][:256] == 0).all() and (case.read(i)[-1][512:] == 0).all()
    assert case.params[-1][300].isnan()
    assert case.params[-1].isnan().sum() == 1


def test_refusals():
    p = torch.zeros(4, 64, device=DEVICE)
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=DEVICE)
    scale, wrong = torch.zeros(1, device=DEVICE), torch.zeros(2, device=DEVICE)
    for params, state, scales, said in (
        (p.half(), codes, scale, "float16"),
        (p, codes[:2], scale, r"\[2, 64\]"),
        (p, codes, wrong, r"\[2\]"),
        (p.T, codes, scale, "contiguous"),
        (p, p.half(), None, "float16"),
    ):
        with pytest.raises(ValueError, match=said):
            blockwise_table([params], States([state], [None], [scales], [None]))
