"""The fused AdamW: torch's own in fp32, stochastic rounding in bf16, the same bits each time."""

import pytest
import torch
from kernel_cases import DEVICE, randn

from fluxfast_kernels.launch import OPTIM_LAUNCH
from fluxfast_kernels.optim import adamw_step, adamw_table
from fluxfast_kernels.update_tables import gradient_table

HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
# one element, odd, exactly one block, a block and a bit
SIZES = [1, 63, 1024, 1500]


def tensors(dtype, sizes=SIZES, *, shift=0):
    """Parameters, gradients and two moments of the sizes that are trained.

    With `shift` they are views that start off a 16-byte boundary.
    """
    groups = []
    for kind, scale in enumerate((1.0, 0.1, 0.05, 0.01)):
        group = []
        for i, size in enumerate(sizes):
            values = randn(size, seed=10 * kind + i, scale=scale)
            buffer = torch.full((size + shift + 1,), 7.0, dtype=dtype, device=DEVICE)
            view = buffer[shift : shift + size]
            view.copy_(values.square() if kind == 3 else values)
            group.append(view)
        groups.append(group)
    return groups


def expected_update(p, g, m, v, step):
    """The formulas in fp64."""
    p, g, m, v = (t.double() for t in (p, g, m, v))
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + HYPER["eps"])
    return p * (1 - lr * HYPER["weight_decay"]) - lr * update, m, v


def update(table, grads, **options):
    adamw_step(table, gradient_table(table, grads), **options)


def run(groups, *, step=3, seed=5):
    params, grads, exp_avgs, exp_avg_sqs = groups
    update(adamw_table(params, exp_avgs, exp_avg_sqs), grads, step=step, seed=seed, **HYPER)
    return [*params, *exp_avgs, *exp_avg_sqs]


def test_fp32_is_torchs_adamw():
    params = [torch.nn.Parameter(p.clone()) for p in tensors(torch.float32)[0]]
    (beta1, beta2), eps = HYPER["betas"], HYPER["eps"]
    optimizer = torch.optim.AdamW(params, HYPER["lr"], (beta1, beta2), eps, HYPER["weight_decay"])
    ours = [p.detach().clone() for p in params]
    table = adamw_table(
        ours, [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    )
    for step in range(1, 6):
        grads = [randn(p.numel(), seed=100 * step + i).float() for i, p in enumerate(params)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        update(table, grads, step=step, seed=0, **HYPER)
    for actual, p in zip(ours, params, strict=True):
        # a few fp32 roundings a step
        torch.testing.assert_close(actual, p.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_bf16_rounds_to_a_neighbour(shift, grad_dtype):
    groups = tensors(torch.bfloat16, shift=shift)
    groups[1] = [g.to(grad_dtype) for g in groups[1]]
    expected = zip(
        *(expected_update(*args, step=3) for args in zip(*groups, strict=True)), strict=True
    )
    actual = run(groups)
    up = down = 0
    for value, exact in zip(actual, (t for group in expected for t in group), strict=True):
        # the neighbours are less than a step, 2^-7 of the value, away; fp32 on the way there costs
        # next to nothing
        error = (value.double() - exact) / exact.abs()
        assert error.abs().max() < 2**-7 * (1 + 1e-4)
        up, down = up + int((error > 0).sum()), down + int((error < 0).sum())
        buffer = value.untyped_storage()
        edges = torch.tensor([], dtype=value.dtype, device=DEVICE).set_(buffer)[[*range(shift), -1]]
        assert (edges == 7).all()
    # of 7764 roundings, half go up: 0.02 is 3.5 standard deviations
    assert abs(up / (up + down) - 0.5) < 0.02


def test_rounding_keeps_the_mean():
    # without gradients and moments a step multiplies by 1 - lr·weight_decay: here, less than an
    # eighth of a bf16 step
    p = torch.full((20_000,), 1.0, dtype=torch.bfloat16, device=DEVICE)
    zeros = [torch.zeros_like(p) for _ in range(3)]
    decay = 1 - HYPER["lr"] * HYPER["weight_decay"]
    run([[p], *([z] for z in zeros)])
    values = p.float().unique()
    assert values.tolist() == [1 - 2**-8, 1.0]
    # standard deviation of one element, sqrt(q (1 - q)) · 2^-8 with q = 0.077, over 20,000: four of
    # them
    assert abs(p.double().mean().item() - decay) < 4 * 0.27 * 2**-8 / 20_000**0.5
    assert all(not z.any() for z in zeros)


def test_the_same_bits_again_and_others_otherwise(monkeypatch):
    first = run(tensors(torch.bfloat16))
    assert all(map(torch.equal, run(tensors(torch.bfloat16)), first))
    for call in ({"seed": 6}, {"step": 3, "seed": 5 + (1 << 40)}):
        other = run(tensors(torch.bfloat16), **call)
        assert not torch.equal(other[3], first[3]) and not torch.equal(other[11], first[11])
    # how tensors are cut into blocks, and whether they lie in one buffer or in several, changes
    # nothing
    monkeypatch.setattr(
        "fluxfast_kernels.optim.OPTIM_LAUNCH", {"default": {"BLOCK": 64, "num_warps": 1}}
    )
    assert all(map(torch.equal, run(tensors(torch.bfloat16)), first))
    flat, whole = tensors(torch.bfloat16, [512]), tensors(torch.bfloat16, [512])
    parts = [[t for flat_t in group for t in flat_t.split([128, 384])] for group in flat]
    run(parts), run(whole)
    for split_group, whole_group in zip(flat, whole, strict=True):
        assert torch.equal(split_group[0], whole_group[0])


def test_noise_differs_between_results_neighbours_and_tensors():
    same = torch.full((4096,), 1.0 + 2**-9, dtype=torch.float32, device=DEVICE)
    # β = 0 in both moments makes m = g and v = g²: three roundings of values a quarter or a half
    # step above one
    hyper = HYPER | {"betas": (0.0, 0.0), "lr": 0.0}
    groups = [
        [torch.zeros(4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)] for _ in range(3)
    ]
    update(adamw_table(*groups), [same, same], step=1, seed=1, **hyper)
    m, other_m, v, _ = (t.double() for t in (*groups[1], *groups[2]))
    for a, b in ((m, other_m), (m, v), (m[::2], m[1::2]), (m[1:], m[:-1])):
        # independent columns correlate by 1/sqrt(n): five of those
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 5 / len(a) ** 0.5


def test_nan_and_infinity_stay():
    groups = tensors(torch.bfloat16, [8])
    groups[1][0][2], groups[1][0][3] = float("nan"), float("inf")
    p, m, v = run(groups)
    assert p[2].isnan() and m[2].isnan() and v[2].isnan()
    assert p[3].isnan() and m[3] == float("inf") and v[3] == float("inf")
    keep = [0, 1, 4, 5, 6, 7]
    assert p[keep].isfinite().all()


def test_refusals():
    p = torch.zeros(4, 4, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="float16"):
        adamw_table([p.half()], [p.half()], [p.half()])
    with pytest.raises(ValueError, match="one dtype"):
        adamw_table([p], [p.float()], [p])
    with pytest.raises(ValueError, match="contiguous"):
        gradient_table(adamw_table([p], [p.clone()], [p.clone()]), [p.T])


def test_blocks_hold_whole_pairs():
    assert all(numbers["BLOCK"] % 2 == 0 for numbers in OPTIM_LAUNCH.values())
