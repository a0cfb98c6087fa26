"""Hosts of each kind by name, and what a report counts of their calls."""

import pytest
import torch
from dropin_hosts import add_lora, diffusers_host, inject_peft, pair
from host_of_sd_scripts import Flux
from host_of_simpletuner import OlderFlux

HOSTS = {"diffusers": diffusers_host, "concatenated": OlderFlux, "bfl": Flux}

every_kind = pytest.mark.parametrize("kind", HOSTS)

other_kinds = pytest.mark.parametrize("kind", ["concatenated", "bfl"])


def hosts(kind):
    torch.manual_seed(0)
    return pair(lambda: HOSTS[kind]().requires_grad_(False))


def peft_on(model):
    """PEFT's LoRA, as the model's kind is given it."""
    add_lora(model) if hasattr(model, "add_adapter") else inject_peft(model)
    return model


def hosts_with_peft(kind):
    return tuple(peft_on(model) for model in hosts(kind))


def output(model, inputs, *, gradients=False):
    with torch.set_grad_enabled(gradients):
        out = model(**inputs)
    return (out if isinstance(out, torch.Tensor) else out[0]).detach()


def counts(report):
    return tuple(report.calls(how) for how in ("fused", "composed", "host"))


def single_blocks(model):
    return model.single_blocks if isinstance(model, Flux) else model.single_transformer_blocks
