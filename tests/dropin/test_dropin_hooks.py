"""Hooks that change weights during a call, and weights in dtypes that nothing multiplies."""

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook, apply_layerwise_casting
from dropin_hosts import (
    FP32,
    add_lora,
    diffusers_host,
    inject_peft,
    lora_parameters,
    outputs_and_grads,
    pair,
)
from host_of_sd_scripts import Flux
from host_of_simpletuner import OlderFlux

import fluxfast
from support import make_inputs, relative_error

HOSTS = {"diffusers": diffusers_host, "concatenated": OlderFlux, "bfl": Flux}
# 2^-8 a rounding, over every op of five blocks, of which the host rounds each
BF16, FP16 = 2e-2, 4e-3


def with_lora(make):
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    if make is diffusers_host:
        add_lora(model)
    else:
        inject_peft(model)
    return model


class Elsewhere:
    """Makes a module's weights NaN outside its calls, so that reading them then is noticed."""

    def __init__(self, module):
        self.kept = {p: p.data.clone() for p in module.parameters(recurse=False)}
        self.leave()

    def come(self):
        for p, value in self.kept.items():
            p.data = value

    def leave(self):
        for p in self.kept:
            p.data = torch.full_like(p.data, float("nan"))


def by_torch(module, weights):
    module.register_forward_pre_hook(lambda *_: weights.come())
    module.register_forward_hook(lambda *_: weights.leave())


def by_diffusers(module, weights):
    class Moves(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            weights.come()
            return args, kwargs

        def post_forward(self, module, output):
            weights.leave()
            return output

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Moves(), "moves")


def by_accelerate(module, weights):
    class Moves(AccelerateHook):
        def pre_forward(self, module, *args, **kwargs):
            weights.come()
            return args, kwargs

        def post_forward(self, module, output):
            weights.leave()
            return output

    add_hook_to_module(module, Moves())


def by_replacement(module, weights):
    original = module.forward

    def forward(*args, **kwargs):
        weights.come()
        try:
            return original(*args, **kwargs)
        finally:
            weights.leave()

    module.forward = forward


def leaves(model):
    """Every module of the blocks that has weights: linears, adapters' linears, norms."""
    blocks = [m for m in model.modules() if type(m).__name__.endswith("Block")]
    assert len(blocks) == 5
    return [m for block in blocks for m in block.modules() if list(m.parameters(recurse=False))]


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("hang", [by_torch, by_diffusers, by_accelerate, by_replacement])
@pytest.mark.parametrize("which", ["all", "linears", "norms"])
def test_weights_that_are_there_for_the_length_of_a_call(kind, hang, which):
    host, ours = pair(lambda: with_lora(HOSTS[kind]))
    report = fluxfast.accelerate(ours)
    inputs = make_inputs(2, 3, 5, guidance=False)
    with torch.no_grad():
        expected = host(**inputs)
    hung = [
        m
        for m in leaves(ours)
        if which == "all" or (type(m).__name__ == "Linear") == (which == "linears")
    ]
    assert len(hung) > 10
    for module in hung:
        hang(module, Elsewhere(module))
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="fluxfast: .*(has hooks|forward was replaced)"),
    ):
        actual = ours(**inputs)
    first = [out if isinstance(out, torch.Tensor) else out.sample for out in (actual, expected)]
    assert relative_error(*first) < FP32
    assert report.calls() == 5 and report.calls("fused") == 0


def test_what_hooks_leave_behind_is_no_hook():
    """accelerate and diffusers leave a bound forward where none was."""
    host, ours = pair(lambda: with_lora(diffusers_host))
    block = ours.transformer_blocks[0]
    for module in (*leaves(ours), block):
        if type(module).__name__ == "Linear":
            add_hook_to_module(module, AccelerateHook())
            remove_hook_from_module(module)
        else:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(ModelHook(), "nothing")
            registry.remove_hook("nothing")
    assert "forward" in block.__dict__ and "forward" in block.ff.net[2].base_layer.__dict__
    report = fluxfast.accelerate(ours, strict=True)
    inputs = make_inputs(2, 3, 5, guidance=False)
    with torch.no_grad():
        assert relative_error(ours(**inputs).sample, host(**inputs).sample) < FP32
    assert report.calls("fused") == 5


# storage, compute, and what the host's own roundings explain
CASTS = [
    (torch.float8_e4m3fn, torch.float32, FP32),
    (torch.bfloat16, torch.float32, FP32),
    (torch.float8_e4m3fn, torch.bfloat16, BF16),
    (torch.float8_e5m2, torch.float16, FP16),
]


@pytest.mark.parametrize(("storage", "compute", "tolerance"), CASTS)
@pytest.mark.parametrize("adapters", ["apart", "cast too"])
@pytest.mark.parametrize("before", [True, False])
def test_layerwise_casting_with_lora(storage, compute, tolerance, adapters, before):
    """diffusers' method leaves adapters as they are; its function casts them too."""
    host, ours = pair(lambda: with_lora(diffusers_host).to(compute))
    if before:
        fluxfast.accelerate(ours)
    for model in (host, ours):
        if adapters == "apart":
            model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
        else:
            # by default what is called norm is left out, which would be the modulation as well
            apply_layerwise_casting(
                model,
                storage,
                compute,
                ("pos_embed", r"norm_[qk]$", r"norm_added_[qk]$", "norm_out"),
            )
    report = fluxfast.accelerate(ours)
    assert "diffusers' peft_autocast_disable" in str(
        report
    ) or "diffusers' layerwise_casting" in str(report)
    inputs = {
        k: x if "ids" in k else x.to(compute)
        for k, x in make_inputs(2, 3, 5, guidance=False).items()
    }
    # values whose product with 1000 bf16 holds exactly: elsewhere the two precisions embed
    # different timesteps
    inputs["timestep"] = torch.tensor([0.5, 0.25], dtype=compute)
    with torch.no_grad():
        expected, actual = host(**inputs).sample, ours(**inputs).sample
    assert actual.dtype == compute and relative_error(actual, expected) < tolerance
    if adapters == "cast too":
        # a gradient of what is stored in 8 bits is nothing to train with
        return
    (_, truth), (_, grads) = (
        outputs_and_grads(model, inputs, lora_parameters(model)) for model in (host, ours)
    )
    for name, grad in grads.items():
        assert (
            grad.dtype == truth[name].dtype and relative_error(grad, truth[name]) < 3 * tolerance
        ), name
    assert report.calls("host") == 0 and report.calls() == 10


@pytest.mark.parametrize("lora", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_base_in_float8_under_autocast(lora, policy):
    """As sd-scripts trains with fp8_base: blocks and norms in 8 bits, adapters in 16 or 32."""
    host, ours = pair(lambda: with_lora(Flux))
    for model in (host, ours):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = p.data.to(lora)
            else:
                p.data = p.data.to(torch.float8_e4m3fn if "blocks." in name else torch.bfloat16)
    report = fluxfast.accelerate(ours, recompute=policy, strict=True)
    assert {linear.base for linear in report.linears} == {"float8_e4m3fn"}
    inputs = {
        k: x if "ids" in k else x.bfloat16()
        for k, x in make_inputs(2, 3, 5, guidance=False).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        (expected, truth), (actual, grads) = (
            outputs_and_grads(m, inputs, lora_parameters(m)) for m in (host, ours)
        )
    assert actual.dtype == expected.dtype and relative_error(actual, expected) < BF16
    flat, flat_truth = (
        torch.cat([g.float().flatten() for g in every.values()]) for every in (grads, truth)
    )
    assert {g.dtype for g in grads.values()} == {lora} and relative_error(
        flat, flat_truth
    ) < 2 * BF16
    assert report.calls("fused") == report.calls() == 5
