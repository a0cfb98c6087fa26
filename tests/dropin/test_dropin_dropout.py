"""PEFT's adapters with a dropout, fused on request: `accelerate(share_dropout=True)`.

Masks are random, so the host gets those that were drawn for ours, and has to compute the same.
"""

import copy
from functools import partial

import pytest
import torch
from dropin_hosts import (
    FP32,
    add_lora,
    assert_equal,
    diffusers_host,
    lora_parameters,
    outputs_and_grads,
    pair,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fluxfast
from fluxfast.dropin.hosts import accelerated_blocks
from fluxfast.ops.linear import products_torch
from support import make_inputs, relative_error


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


class FixedMask(nn.Module):
    """In the place of a dropout: the mask that was drawn for its linear's input."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask.view(x.shape)


@pytest.fixture
def masks(monkeypatch):
    """By seed, in the order in which they were drawn: the mask of each group of linears."""
    found, draw = {}, products_torch._mask

    def drawn(x, p, seed, number):
        mask = draw(x, p, seed, number)
        found.setdefault(int(seed), {})[number] = mask.clone()
        return mask

    monkeypatch.setattr(products_torch, "_mask", drawn)
    return found


def dropped_host(dropout=0.4):
    model = diffusers_host()
    add_lora(model, lora_dropout=dropout)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "blocks." not in name:
            # of the layers around the blocks, whose masks are PEFT's
            module.p = 0.0
    return model.train()


def results(model, inputs):
    torch.manual_seed(11)
    return outputs_and_grads(model, inputs, lora_parameters(model))


@pytest.mark.parametrize("impl", ["auto", "ref"])
def test_the_host_computes_the_same_with_these_masks(inputs, masks, impl):
    host, ours = pair(dropped_host)
    report = fluxfast.accelerate(ours, share_dropout=True, strict=True, impl=impl)
    actual, grads = results(ours, inputs)
    assert report.calls("fused") == report.calls() == 5
    drawn = iter(masks.values())
    for name, block in accelerated_blocks(ours):
        names = {id(module): f"{name}.{inner}" for inner, module in block.named_modules()}
        # a modulation's linear is by itself, before the others
        alone = [((linear,), next(drawn)[0]) for linear in block.modulation_linears()]
        of_groups = next(drawn)
        together = [(group, of_groups[i]) for i, group in enumerate(block.linear_groups())]
        for group, mask in (*alone, *together):
            assert all(value in (0, pytest.approx(1 / 0.6)) for value in mask.unique().tolist())
            for module in group:
                held = host.get_submodule(names[id(module)]).lora_dropout
                held["default"] = FixedMask(mask)
    assert next(drawn, None) is None
    expected, expected_grads = results(host, inputs)
    assert relative_error(actual, expected) < FP32
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < FP32, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_seed_says_what_is_drawn(inputs, reentrant):
    """Whatever computes the block again: a checkpoint sets torch's generator as it was."""
    _, ours = pair(dropped_host)
    fluxfast.accelerate(ours, share_dropout=True, strict=True)
    first, grads = results(ours, inputs)
    again, _ = results(ours, inputs)
    assert torch.equal(first, again)
    torch.manual_seed(12)
    other, _ = outputs_and_grads(ours, inputs, lora_parameters(ours))
    assert relative_error(other, first) > 1e-3
    ours.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    checkpointed, same = results(ours, inputs)
    assert relative_error(checkpointed, first) < FP32
    for name, grad in same.items():
        assert relative_error(grad, grads[name]) < FP32, name


def test_in_evaluation_nothing_is_dropped(inputs):
    host, ours = (model.eval() for model in pair(dropped_host))
    fluxfast.accelerate(ours, share_dropout=True, strict=True)
    assert_equal(host, ours, inputs)


def test_without_the_wish_they_are_called(inputs):
    host, ours = pair(dropped_host)
    report = fluxfast.accelerate(ours)
    assert_equal(host, ours, inputs)
    assert report.calls("fused") == 0 and "share_dropout=True would fuse it" in str(report)
    with pytest.raises(ValueError, match="share_dropout=True"):
        fluxfast.accelerate(ours, strict=True)
    # the last call's choices hold, in copies, too
    fluxfast.accelerate(ours, share_dropout=True)
    report = fluxfast.dropin.inspect(twin := copy.deepcopy(ours))
    results(twin, inputs)
    assert report.calls("fused") == 5
