import json
import math

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import Parameter

from fluxfast.train import optim
from fluxfast.train.optim import (
    AdamWBF16,
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    stochastic_round,
)

BF16 = torch.bfloat16
# one element, odd sizes, and more than one pass of the CPU
SHAPES = [(1,), (63,), (5, 7), (1000,), (300, 500)]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    g = _generator(1)
    return [Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def _set_gradients(params: list[Parameter], step: int) -> None:
    g = _generator(100 + step)
    for p in params:
        # elements of very different size
        p.grad = (
            torch.randn(p.shape, generator=g) * 10.0 ** torch.randint(-6, 1, p.shape, generator=g)
        ).to(p.dtype)


@pytest.mark.parametrize("x", [1.0, -3.7, 1.0 + 2**-9, 1.0 + 2**-16, 3e-39, -1e30, 0.1])
def test_rounding_keeps_the_mean_and_gives_the_two_neighbours(x):
    n = 200_001
    value = torch.tensor(x)
    down = (value.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    up = ((value.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    rounded = stochastic_round(value.expand(n), _generator()).double()
    assert rounded.shape == (n,)
    assert set(rounded.unique().tolist()) <= {down.item(), up.item()}
    # a Bernoulli mean's standard error is at most half the gap over √n: five of them
    tolerance = 5 * 0.5 / math.sqrt(n) * abs(up - down).item()
    assert rounded.mean().item() == pytest.approx(value.double().item(), abs=tolerance, rel=0)


def test_rounding_leaves_what_bf16_holds():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    for seed in range(3):
        rounded = stochastic_round(every.float(), _generator(seed))
        same = rounded.view(torch.int16) == every.view(torch.int16)
        assert (same | every.isnan()).all()
        assert rounded.isnan().equal(every.isnan())


def test_rounding_keeps_nan_payloads_nan():
    words = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32)
    x = torch.cat([words, words | -(1 << 31)]).view(torch.float32).repeat(1000)
    assert stochastic_round(x, _generator()).isnan().all()


def test_rounding_noise_is_independent_between_elements():
    # halfway between neighbours every element is a fair coin; four neighbours share one random word
    x = torch.full((400_000,), 1.0 + 2**-8)
    coins = (stochastic_round(x, _generator()).float() > 1).double().view(-1, 4) * 2 - 1
    correlation = coins.T @ coins / len(coins)
    # a standard error of 1 / √100,000 = 0.003
    torch.testing.assert_close(correlation, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.016)


def test_fp32_parameters_follow_torchs_adamw():
    ours, theirs = _params(), _params()
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a, b = AdamWBF16(ours, **arguments), torch.optim.AdamW(theirs, **arguments)
    for step in range(50):
        for params, optimizer in ((ours, a), (theirs, b)):
            _set_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        # fifty steps of fp32 rounding, 2^-24 each, on values up to about 4
        torch.testing.assert_close(p, q, rtol=1e-5, atol=5e-6)


def test_several_passes_and_single_ones_agree(monkeypatch):
    one, many = _params(), _params()
    a, b = AdamWBF16(one, 1e-2), AdamWBF16(many, 1e-2)
    for step in range(3):
        _set_gradients(one, step)
        _set_gradients(many, step)
        a.step()
        monkeypatch.setitem(optim._PASS_ELEMENTS, "cpu", 64)
        b.step()
        monkeypatch.undo()
    assert all(torch.equal(p, q) for p, q in zip(one, many, strict=True))


def test_bf16_moves_where_rounding_to_nearest_stalls():
    # parameters near 1, where bf16's ulp is 2^-7, and steps of 2e-4: to nearest, none of them ever
    # arrives
    n, lr, steps = 4096, 2e-4, 400
    start = 1 + torch.rand(n, generator=_generator()) * 0.5

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


def _as_files(optimizer: torch.optim.Optimizer) -> tuple[bytes, str]:
    """A state_dict as safetensors and JSON, which is all a checkpoint may hold."""
    state = optimizer.state_dict()
    tensors = {
        f"{i}.{k}": v
        for i, entry in state["state"].items()
        for k, v in entry.items()
        if torch.is_tensor(v)
    }
    numbers = {
        i: {k: v for k, v in e.items() if not torch.is_tensor(v)} for i, e in state["state"].items()
    }
    return save(tensors), json.dumps({"numbers": numbers, "groups": state["param_groups"]})


def _from_files(data: bytes, text: str) -> dict:
    plain = json.loads(text)
    state = {int(i): dict(entry) for i, entry in plain["numbers"].items()}
    for key, tensor in load(data).items():
        index, name = key.split(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": plain["groups"]}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["adamw_bf16", "torch-adamw"])
def test_a_resumed_run_is_bit_identical(name, dtype):
    straight = _params(dtype)
    optimizer = build_optimizer(name, straight, lr=1e-3, seed=7)
    for step in range(6):
        if step == 3:
            files, saved = _as_files(optimizer), [p.detach().clone() for p in straight]
        _set_gradients(straight, step)
        optimizer.step()

    resumed = [Parameter(p.clone()) for p in saved]
    # another seed: the saved one wins
    again = build_optimizer(name, resumed, lr=1e-3, seed=8)
    again.load_state_dict(_from_files(*files))
    torch.manual_seed(12345)
    for step in range(3, 6):
        torch.rand(3)
        _set_gradients(resumed, step)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    assert _as_files(optimizer) == _as_files(again)


def test_the_seed_and_nothing_else_makes_the_noise():
    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        params = _params(BF16)
        optimizer = AdamWBF16(params, 1e-3, seed=seed)
        before = torch.get_rng_state()
        for step in range(2):
            _set_gradients(params, step)
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


def test_factory():
    p = Parameter(torch.ones(2))
    a = build_optimizer("adamw_bf16", [p], lr=1e-3, betas=(0.8, 0.9), weight_decay=0.2)
    assert isinstance(a, AdamWBF16)
    group = a.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
        1e-3,
        (0.8, 0.9),
        0.2,
        1e-6,
    )
    b = build_optimizer("torch-adamw", [p], lr=1e-3)
    assert type(b) is torch.optim.AdamW
    assert b.param_groups[0]["eps"] == 1e-8
    assert build_optimizer("torch-adamw", [p], lr=1e-3, eps=1e-4).param_groups[0]["eps"] == 1e-4
    with pytest.raises(
        ValueError, match="'optimi-lion' isn't implemented: choose one of adamw_bf16, torch-adamw"
    ):
        build_optimizer("optimi-lion", [p], lr=1e-3)


def test_norms_and_embedders_are_not_decayed():
    names = [
        "x_embedder.lora_A",
        "blocks.0.norm1.linear.lora_B",
        "blocks.0.attn.to_q.lora_A",
        "proj_out.bias",
    ]
    params = {name: Parameter(torch.ones(1)) for name in names}
    groups = build_optimizer("adamw_bf16", params, lr=1.0, weight_decay=0.5).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 1), (0.0, 3)]
    assert groups[0]["params"][0] is params["blocks.0.attn.to_q.lora_A"]
    del params["x_embedder.lora_A"], params["blocks.0.norm1.linear.lora_B"], params["proj_out.bias"]
    assert len(build_optimizer("torch-adamw", params, lr=1.0).param_groups) == 1


def _curve(name, steps=12, lr=1e-3, **arguments):
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=lr)
    scheduler = build_lr_scheduler(optimizer, name, total=10, lr_end=1e-4, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


RISE = [0.0, 5e-4]


def _expected(name, progress):
    low, high = 1e-4, 1e-3
    return {
        "constant": high,
        "constant_with_warmup": high,
        "linear": high * (1 - progress),
        "polynomial": low + (high - low) * (1 - progress) ** 0.8,
        "cosine": low + (high - low) * (1 + math.cos(math.pi * progress)) / 2,
    }[name]


@pytest.mark.parametrize("name", optim.LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedules(name, warmup):
    rates = _curve(name, warmup=warmup)
    progress = [min(1.0, (step - warmup) / (10 - warmup)) for step in range(warmup, 12)]
    assert rates == pytest.approx(
        RISE[:warmup] + [_expected(name, p) for p in progress], rel=1e-9, abs=1e-12
    )


def test_schedules_refuse():
    with pytest.raises(ValueError, match="'sine' isn't implemented: choose one of constant, "):
        _curve("sine")
    with pytest.raises(
        ValueError,
        match=r"lr_end must be below learning_rate for polynomial, got 0\.0001 and 5e-05",
    ):
        _curve("polynomial", lr=5e-5)
    assert _curve("constant", lr=5e-5)[-1] == 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("method", ["norm", "value"])
def test_clipping(method, max_norm, dtype):
    params = _params(dtype)
    _set_gradients(params, 0)
    before = [p.grad.double() for p in params]
    total = clip_gradients([p.grad for p in params], method, max_norm)
    exact = math.sqrt(sum((g * g).sum().item() for g in before))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact, rel=1e-5)
    for p, g in zip(params, before, strict=True):
        if max_norm == 0:
            expected = g
        elif method == "norm":
            # torch scales by max / (total + 1e-6), one part in 10^8 here
            expected = g * min(1.0, max_norm / exact)
        else:
            expected = g.clamp(-max_norm, max_norm)
        # one rounding to the gradients' dtype
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(p.grad.double(), expected, rtol=rtol, atol=1e-12)


def test_clipping_without_gradients_and_unknown_methods():
    assert clip_gradients([], "norm", 1.0).item() == 0
    with pytest.raises(ValueError, match="'agc'"):
        clip_gradients([], "agc", 1.0)  # type: ignore[arg-type]
