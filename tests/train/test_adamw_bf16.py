import math

import pytest
import torch
from optim_cases import BF16, generator, parameters, set_gradients
from torch.nn import Parameter

from fluxfast.train import multi_tensor
from fluxfast.train.adamw_bf16 import AdamWBF16, stochastic_round


@pytest.mark.parametrize("x", [1.0, -3.7, 1.0 + 2**-9, 1.0 + 2**-16, 3e-39, -1e30, 0.1])
def test_rounding_keeps_the_mean_and_gives_the_two_neighbours(x):
    n = 200_001
    value = torch.tensor(x)
    down = (value.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    up = ((value.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    rounded = stochastic_round(value.expand(n), generator()).double()
    assert rounded.shape == (n,)
    assert set(rounded.unique().tolist()) <= {down.item(), up.item()}
    # a Bernoulli mean's standard error is at most half the gap over √n: five of them
    tolerance = 5 * 0.5 / math.sqrt(n) * abs(up - down).item()
    assert rounded.mean().item() == pytest.approx(value.double().item(), abs=tolerance, rel=0)


def test_rounding_leaves_what_bf16_holds():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    for seed in range(3):
        rounded = stochastic_round(every.float(), generator(seed))
        same = rounded.view(torch.int16) == every.view(torch.int16)
        assert (same | every.isnan()).all()
        assert rounded.isnan().equal(every.isnan())


def test_rounding_keeps_nan_payloads_nan():
    words = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32)
    x = torch.cat([words, words | -(1 << 31)]).view(torch.float32).repeat(1000)
    assert stochastic_round(x, generator()).isnan().all()


def test_rounding_noise_is_independent_between_elements():
    # halfway between neighbours every element is a fair coin; four neighbours share one random word
    x = torch.full((400_000,), 1.0 + 2**-8)
    coins = (stochastic_round(x, generator()).float() > 1).double().view(-1, 4) * 2 - 1
    correlation = coins.T @ coins / len(coins)
    # a standard error of 1 / √100,000 = 0.003
    torch.testing.assert_close(correlation, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.016)


def test_fp32_parameters_follow_torchs_adamw():
    ours, theirs = parameters(), parameters()
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a, b = AdamWBF16(ours, **arguments), torch.optim.AdamW(theirs, **arguments)
    for step in range(50):
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        # fifty steps of fp32 rounding, 2^-24 each, on values up to about 4
        torch.testing.assert_close(p, q, rtol=1e-5, atol=5e-6)


def test_several_passes_and_single_ones_agree(monkeypatch):
    one, many = parameters(), parameters()
    a, b = AdamWBF16(one, 1e-2), AdamWBF16(many, 1e-2)
    for step in range(3):
        set_gradients(one, step)
        set_gradients(many, step)
        a.step()
        monkeypatch.setitem(multi_tensor.PASS_ELEMENTS, "cpu", 64)
        b.step()
        monkeypatch.undo()
    assert all(torch.equal(p, q) for p, q in zip(one, many, strict=True))


def test_bf16_moves_where_rounding_to_nearest_stalls():
    # parameters near 1, where bf16's ulp is 2^-7, and steps of 2e-4: to nearest, none of them ever
    # arrives
    n, lr, steps = 4096, 2e-4, 400
    start = 1 + torch.rand(n, generator=generator()) * 0.5

    def gradient(p):
        return p.detach().float() - 0.5

    exact = Parameter(start.to(BF16).float())
    nearest = Parameter(start.to(BF16))
    ours = Parameter(start.to(BF16))
    reference = torch.optim.AdamW([exact], lr=lr, eps=1e-6, weight_decay=0)
    stalled = torch.optim.AdamW([nearest], lr=lr, eps=1e-6, weight_decay=0)
    rounded = AdamWBF16([ours], lr=lr, weight_decay=0)
    for _ in range(steps):
        for p, optimizer in ((exact, reference), (nearest, stalled), (ours, rounded)):
            p.grad = gradient(p).to(p.dtype)
            optimizer.step()
    assert torch.equal(nearest, start.to(BF16))
    moved = (start.to(BF16).float() - exact).mean().item()
    assert moved == pytest.approx(lr * steps, rel=0.1)
    drift = (ours.detach().float() - exact).mean().item()
    # each element is a random walk of at most √steps half-ulps; their mean over n of them is 64
    # times steadier
    assert abs(drift) < 0.02 * moved + 5 * math.sqrt(steps) * 2**-8 / math.sqrt(n) * 0.25
    assert (ours.detach().float() - exact).std().item() < math.sqrt(steps) * 2**-8


def test_bf16_second_moment_decays_without_bias():
    p = Parameter(torch.zeros(4096, dtype=BF16))
    optimizer = AdamWBF16([p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].float().mean().item()
    assert first == pytest.approx(1e-3, rel=1e-3)
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        optimizer.step()
    # to nearest it would still be 1e-3; each element carries about 4 % of noise, their mean 0.06 %
    second = optimizer.state[p]["exp_avg_sq"].float()
    assert second.mean().item() == pytest.approx(first * 0.999**1000, rel=0.01)
    assert (second.std() / second.mean()).item() < 0.1
    assert optimizer.state[p]["exp_avg_sq"].dtype == optimizer.state[p]["exp_avg"].dtype == BF16


def test_the_seed_and_nothing_else_makes_the_noise():
    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        params = parameters(BF16)
        optimizer = AdamWBF16(params, 1e-3, seed=seed)
        before = torch.get_rng_state()
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        return params[-1].detach()

    assert torch.equal(run(1, 1), run(1, 2))
    assert not torch.equal(run(1, 1), run(2, 1))


def test_noise_differs_between_steps_and_groups():
    params = [Parameter(torch.ones(1000, dtype=BF16)) for _ in range(2)]
    optimizer = AdamWBF16([{"params": [p]} for p in params], lr=2**-9, weight_decay=0)
    seen = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().clone() for p in params]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_parameters_without_a_gradient_are_left_and_age_apart():
    late, early = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = AdamWBF16([early, late], lr=0.1, weight_decay=0)
    early.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(late, torch.ones(3))
    late.grad = torch.ones(3)
    optimizer.step()
    # bias correction counts each parameter's own steps: the first is of size lr
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.9))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float16"):
        AdamWBF16([Parameter(torch.ones(1, dtype=torch.float16))], lr=1e-3)
