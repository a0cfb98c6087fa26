"""Every optimiser that a config may name: it descends, and it resumes with the same bits."""

import json

import pytest
import torch
from optim_cases import installed, parameters, set_gradients
from safetensors.torch import load, save
from torch.nn import Parameter

from fluxfast.config.optimizers import optimizer_options
from fluxfast.train.optim import averaged, build_optimizer, check_arguments, load_moments
from fluxfast.train.state import join_tensors, split_tensors

NAMES = optimizer_options()


def built(name, params, **arguments):
    # Adadelta's own steps have the size that they should, and begin tiny
    lr = 1.0 if installed(name).finds_rate or name == "torch-adadelta" else 1e-2
    return build_optimizer(name, params, lr=lr, seed=7, **arguments)


def named(params):
    # the second belongs to a norm, so that there are two groups
    return {f"block.{i}{'.norm' if i == 1 else ''}": p for i, p in enumerate(params)}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(name):
    straight = parameters()
    optimizer = built(name, named(straight))
    for step in range(6):
        if step == 3:
            tensors, numbers = split_tensors(optimizer.state_dict())
            file, text = save(tensors), json.dumps(numbers)
            kept = [p.detach().clone() for p in straight]
        set_gradients(straight, step)
        optimizer.step()
    resumed = [Parameter(p.clone()) for p in kept]
    again = built(name, named(resumed))
    load_moments(again, join_tensors(load(file), json.loads(text)))
    for step in range(3, 6):
        set_gradients(resumed, step)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    with averaged(optimizer), averaged(again):
        assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_nearer_to_the_least_loss(name):
    torch.manual_seed(0)
    goal, p = torch.randn(64, 100), Parameter(torch.zeros(64, 100))
    optimizer = built(name, {"a": p})
    losses = []
    for _ in range(200):
        loss = (p - goal).square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with averaged(optimizer):
        losses.append((p - goal).square().sum().item())
    # Adafactor's step shrinks with the parameters' size, which begins at 0 here
    assert losses[-1] < (0.999 if name == "torch-adafactor" else 0.9) * losses[0]


def test_an_average_is_drawn_with_and_the_point_is_trained_on():
    p = Parameter(torch.randn(1000))
    optimizer = built("adamw_schedulefree", {"a": p})
    for _ in range(3):
        p.grad = torch.randn(1000)
        optimizer.step()
    trained = p.detach().clone()
    with averaged(optimizer):
        assert not torch.equal(p, trained)
    assert torch.equal(p.detach(), trained)
    plain = built("torch-adamw", {"a": p})
    with averaged(plain):
        assert plain.param_groups[0]["lr"] == 1e-2


def test_other_arguments_are_named():
    check_arguments("optimi-lion", {"betas": (0.9, 0.99), "decouple_lr": True})
    with pytest.raises(ValueError, match=r"'optimi-lion' takes no beta7, lr; it takes betas, "):
        check_arguments("optimi-lion", {"lr": 1.0, "beta7": 1})
