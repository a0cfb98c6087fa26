"""Hosts of each kind, with LoRA of both kinds, checkpointed or not, beside hosts left alone."""

import pytest
import torch
from dropin_hosts import assert_equal, diffusers_host, inject_peft, pair, replace_forwards
from host_of_sd_scripts import Flux
from host_of_simpletuner import OlderFlux

import fluxfast
from support import make_inputs, relative_error


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


HOSTS = {
    "diffusers": (diffusers_host, ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    "concatenated": (OlderFlux, ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    "bfl": (Flux, ("DoubleStreamBlock", "SingleStreamBlock")),
}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_lora_by_forward_replacement(inputs, kind, before, checkpointed):
    make, names = HOSTS[kind]
    torch.manual_seed(0)
    host, ours = pair(lambda: make().requires_grad_(False))
    networks = {}
    if before:
        fluxfast.accelerate(ours)
    for model in (host, ours):
        networks[id(model)] = replace_forwards(model, names)
        model.train()
        if checkpointed:
            checkpoint_host(model)
    report = fluxfast.accelerate(ours)
    assert report.layout == kind and report.count("module") == len(report.linears)
    assert_equal(
        host, ours, inputs, trained=lambda model: dict(networks[id(model)].named_parameters())
    )


def checkpoint_host(model):
    if isinstance(model, Flux):
        for block in (*model.double_blocks, *model.single_blocks):
            block.gradient_checkpointing = True
    elif isinstance(model, OlderFlux):
        model.checkpointing = True
    else:
        model.enable_gradient_checkpointing()


@pytest.mark.parametrize("kind", ["concatenated", "bfl"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("variant", ["plain", "per_sample", "mask"])
def test_other_hosts(inputs, kind, checkpointed, variant):
    torch.manual_seed(0)
    host, ours = pair(lambda: HOSTS[kind][0]().requires_grad_(False))
    more = {}
    for model in (host, ours):
        inject_peft(model)
        model.per_sample = variant == "per_sample"
        model.train()
        if checkpointed:
            checkpoint_host(model)
    report = fluxfast.accelerate(ours)
    assert report.layout == kind and all(block.fused for block in report.blocks)
    if variant == "mask":
        keep = torch.ones(2, 7)
        keep[0, 3:] = 0
        more = {"txt_attention_mask" if kind == "bfl" else "attention_mask": keep}
        unmasked = ours(**inputs)
        assert relative_error(ours(**inputs | more), unmasked) > 1e-3
    assert_equal(host, ours, inputs | more)
    assert report.calls() == report.calls("fused") > 0
    fluxfast.restore(ours)
    assert type(next(iter(ours.children()))) is type(next(iter(host.children())))
    with torch.no_grad():
        assert torch.equal(ours(**inputs | more), host(**inputs | more))
