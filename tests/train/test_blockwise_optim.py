"""Our AdamW and Lion with states in 8 bits or fp32, beside bitsandbytes' own."""

import json

import pytest
import torch
from optim_cases import generator
from safetensors.torch import load, save
from torch.nn import Parameter

from fluxfast.ops.blockwise_update import code_maps, dynamic_map, encode, update_ref
from fluxfast.train import blockwise_optim, multi_tensor
from fluxfast.train.optim import load_moments
from fluxfast.train.state import join_tensors, split_tensors

bnb = pytest.importorskip("bitsandbytes")

SIZES = [1, 63, 255, 256, 257, 4095, 4096, 4097, 100_003]
NAMES = ["AdamW8bit", "Lion8bit", "AdamW", "Lion"]
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(dtype=torch.float32, sizes=SIZES):
    g = generator(1)
    return [Parameter(torch.randn(size, generator=g).to(dtype)) for size in sizes]


def set_gradients(params, step):
    g = generator(100 + step)
    for p in params:
        sizes = 10.0 ** torch.randint(-3, 1, p.shape, generator=g)
        p.grad = (torch.randn(p.shape, generator=g) * sizes).to(p.dtype)


def ours(name, params, **options):
    return getattr(blockwise_optim, name)(params, **OPTIONS | {"impl": "ref"} | options)


def theirs(name, params):
    return getattr(bnb.optim, name)(params, **OPTIONS)


@pytest.fixture
def nearest_codes(monkeypatch):
    """bitsandbytes takes the nearest code on a CPU too, as it does on a GPU.

    Its generic version, which it takes for other types than fp32, bf16 and fp16, finds that one.
    """
    from bitsandbytes.backends.cpu import ops

    def store(values, code, absmax, out, blocksize):
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
        out.copy_(codes), absmax.copy_(scales)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", store)


def take_step(optimizer, params, step):
    set_gradients(params, step)
    optimizer.step()


def test_the_map_is_bitsandbytes():
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), bnb.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_stored(signed):
    g = generator()
    x = torch.randn(2048, 256, generator=g) * 10.0 ** torch.randint(-7, 1, (2048, 256), generator=g)
    x = x if signed else x.square()
    # exactly between two numbers, at both ends, and nothing at all
    numbers, bounds = code_maps(torch.device("cpu"))[0 if signed else 1]
    x[0], x[0, 255], x[1] = bounds, 1.0, 0.0
    codes, scales = encode(x, bounds)
    assert torch.equal(scales, x.abs().amax(1))
    normal = x.double() / scales.double().clamp_min(1e-300)[:, None]
    best = (normal[..., None] - numbers.double()).abs().amin(-1)
    error = (normal - numbers.double()[codes.int()]).abs()
    # the quotient is rounded to fp32 before the search
    assert (error <= best + 2.0**-24).all()
    assert codes[0].tolist() == [*range(255), 255]
    assert (numbers[codes[1].int()] == 0).all()


def test_bitsandbytes_rounds_to_a_grid_first_on_a_cpu():
    """What its codes differ by from ours on a CPU: a step of 2/65535 of the scale, and no more."""
    numbers, bounds = code_maps(torch.device("cpu"))[1]
    x = torch.rand(1 << 16, generator=generator()).square().view(-1, 256)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(x, numbers, 256)
    own, own_scales = encode(x, bounds)
    assert torch.equal(scales, own_scales) and not torch.equal(codes, own)
    off = (numbers[codes.int()] - numbers[own.int()]).abs()
    best = (numbers[own.int()] - x / scales[:, None]).abs()
    # both are near the number, theirs to half a step of the grid more on either side
    assert (off <= 2 * best + 2 / 65535 + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_from_bitsandbytes_state_is_bitsandbytes(name, dtype, nearest_codes):
    mine, others = parameters(dtype), parameters(dtype)
    a, b = ours(name, mine), theirs(name, others)
    for step in range(30):
        if step:
            load_moments(a, b.state_dict())
            for p, q in zip(mine, others, strict=True):
                p.data.copy_(q)
        take_step(a, mine, step), take_step(b, others, step)
        for p, q in zip(mine, others, strict=True):
            # the formula's few roundings in fp32 are in another order with fp32 states
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(p, q, **tolerance)
            mine_kept, kept = a.state[p], b.state[q]
            for i in a._numbers:
                assert mine_kept[f"state{i}"].dtype == kept[f"state{i}"].dtype
                if kept[f"state{i}"].dtype == torch.float32:
                    torch.testing.assert_close(mine_kept[f"state{i}"], kept[f"state{i}"])
                    continue
                off = (mine_kept[f"state{i}"].int() - kept[f"state{i}"].int()).abs()
                # bitsandbytes multiplies by the scale's inverse where we divide by the scale: that
                # rounding decides between two codes where a number is about equally near to both
                assert off.max() <= 1 and off.count_nonzero() <= off.numel() / 1000
                assert torch.equal(mine_kept[f"absmax{i}"], kept[f"absmax{i}"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_runs_of_many_steps_stay_together(name, dtype, nearest_codes):
    mine, others = parameters(dtype), parameters(dtype)
    a, b = ours(name, mine), theirs(name, others)
    for step in range(50):
        take_step(a, mine, step), take_step(b, others, step)
    for p, q in zip(mine, others, strict=True):
        # a code that once differs has an element of its own course: one in a thousand at the most
        near = torch.isclose(p, q, rtol=1e-5, atol=1e-5)
        assert (~near).sum() <= p.numel() / 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_is_the_papers(name):
    """A step in fp64, beside the one of fp32 states, whose roundings are fp32's."""
    params = parameters()
    optimizer = ours(name.removesuffix("8bit"), params, weight_decay=0.1)
    exact = [p.detach().double() for p in params]
    states = [[torch.zeros_like(p) for _ in optimizer._numbers] for p in exact]
    for step in range(1, 6):
        take_step(optimizer, params, step)
        for p, kept, own in zip(exact, states, params, strict=True):
            grad = own.grad.double()
            update_ref(optimizer.formula, p, grad, kept, optimizer.param_groups[0], step)
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


def by_hand(optimizer, p):
    """A step of one number in Python's floats, from a fresh state: the formulas once more."""
    (beta1, beta2), eps = OPTIONS["betas"], optimizer.defaults["eps"]
    grad, lr = p.grad.item(), OPTIONS["lr"]
    update = (grad > 0) - (grad < 0)
    if optimizer.formula == "adamw":
        m, v = (1 - beta1) * grad, (1 - beta2) * grad * grad
        update = m / (1 - beta1) / ((v / (1 - beta2)) ** 0.5 + eps)
    return p.item() * (1 - lr * OPTIONS["weight_decay"]) - lr * update


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_by_hand(name):
    p = Parameter(torch.tensor([0.7]))
    optimizer = ours(name, [p], min_8bit_size=1)
    p.grad = torch.tensor([-0.3])
    expected = by_hand(optimizer, p)
    optimizer.step()
    assert p.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_several_passes_and_single_ones_agree(name, monkeypatch):
    one, many = parameters(), parameters()
    a, b = ours(name, one), ours(name, many)
    for step in range(3):
        take_step(a, one, step)
        monkeypatch.setitem(multi_tensor.PASS_ELEMENTS, "cpu", 64)
        take_step(b, many, step)
        monkeypatch.undo()
    assert all(torch.equal(p, q) for p, q in zip(one, many, strict=True))


@pytest.mark.parametrize("change", ["ours to theirs", "theirs to ours", "ours to ours"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_the_others_checkpoint(name, change, nearest_codes):
    before, after = ((ours, theirs)[word == "theirs"] for word in change.split(" to "))
    straight = parameters()
    optimizer = before(name, straight)
    for step in range(6):
        if step == 3:
            tensors, structure = split_tensors(optimizer.state_dict())
            file, text = save(tensors), json.dumps(structure)
            # maps are no part of what grows with the parameters
            assert sum("qmap" in key for key in tensors) <= 2
            resumed = [Parameter(p.detach().clone()) for p in straight]
        take_step(optimizer, straight, step)
    again = after(name, resumed)
    load_moments(again, join_tensors(load(file), json.loads(text)))
    for step in range(3, 6):
        take_step(again, resumed, step)
    for p, q in zip(straight, resumed, strict=True):
        if before is after:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_parameters_resume_with_the_same_bits(name):
    """Codes and fp32 states keep their types, which torch's own loading would not."""
    straight = parameters(torch.bfloat16)
    optimizer = ours(name, straight)
    take_step(optimizer, straight, 0)
    resumed = [Parameter(p.detach().clone()) for p in straight]
    again = ours(name, resumed)
    load_moments(again, optimizer.state_dict())
    take_step(optimizer, straight, 1), take_step(again, resumed, 1)
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    # what was loaded is a copy
    assert all(
        optimizer.state[p]["step"] == again.state[q]["step"] == 2
        for p, q in zip(straight, resumed, strict=True)
    )


def test_nothing_strides_and_parameters_of_two_ages():
    empty = Parameter(torch.empty(0, 5))
    strided = Parameter(torch.randn(70, 100, generator=generator()).T)
    plain = Parameter(strided.detach().contiguous())
    optimizer = ours("AdamW8bit", [empty, strided, plain])
    for step in range(2):
        grad = torch.randn(100, 70, generator=generator(step))
        strided.grad, plain.grad = grad.clone(), grad
        if step:
            empty.grad = torch.empty(0, 5)
        optimizer.step()
    assert torch.equal(strided, plain)
    assert [optimizer.state[p]["step"] for p in (empty, strided)] == [1, 2]


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"blockwise_lion takes bf16 or fp32 .*torch\.float16"):
        ours("Lion8bit", [Parameter(torch.ones(1, dtype=torch.float16))])
