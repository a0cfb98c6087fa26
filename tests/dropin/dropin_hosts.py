"""diffusers' own host, the ways in which programs add LoRA, and comparisons of two hosts."""

import copy

import torch
from diffusers import FluxTransformer2DModel
from host_of_sd_scripts import Flux
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from support import SMALL, randomise, relative_error

# fp32: two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5

ATTENTION = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]

MLPS = [
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]

BFL_TARGETS = [
    "qkv",
    "proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
    "linear2",
    "lin",
]

EVERYTHING = [
    *ATTENTION,
    *MLPS,
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "x_embedder",
    "context_embedder",
]


def diffusers_host(dtype=torch.float32, **config):
    model = FluxTransformer2DModel(**SMALL | config)
    randomise(model)
    return model.requires_grad_(False).to(dtype)


def add_lora(model, name="default", targets=EVERYTHING, seed=3, size=0.2, **config):
    """PEFT's LoRA by diffusers' own call, with factors of trained size."""
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **config), name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key and f".{name}." in key + ".":
                p.copy_(torch.randn(p.shape, generator=g) * size)


def inject_peft(model, **config):
    """PEFT's LoRA on all linears of the blocks of a model that is not diffusers' own."""
    targets = (
        BFL_TARGETS if isinstance(model, Flux) else [t for t in EVERYTHING if "embedder" not in t]
    )
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config), model)
    randomise_trained(model)


class ReplacedForward(nn.Module):
    """LoRA as ai-toolkit, OneTrainer and sd-scripts add it: a module whose forward replaces the
    linear's.
    """

    def __init__(self, linear, rank=3):
        super().__init__()
        self.down, self.up = (
            nn.Linear(linear.in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=False),
        )
        self.original = linear.forward
        linear.forward = self.forward

    def forward(self, x):
        return self.original(x) + 0.6 * self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


def replace_forwards(model, block_classes, seed=5):
    """A network over the linears of the blocks, which are found by their class's name."""
    network = nn.ModuleDict()
    for block_name, block in model.named_modules():
        if type(block).__name__ in block_classes:
            for name, module in block.named_modules():
                if type(module).__name__ == "Linear":
                    network[f"{block_name}.{name}".replace(".", "_")] = ReplacedForward(module)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.15)
    return network


def pair(make, *args, **kwargs):
    """The same host twice: to be left alone, and to be accelerated."""
    host = make(*args, **kwargs)
    return host, copy.deepcopy(host)


def outputs_and_grads(model, inputs, trained):
    """A forward, and the gradients of the named parameters for a fixed weighting of its output."""
    for p in trained.values():
        p.grad = None
    out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view_as(out)
    (out.float() * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in trained.items()}


def lora_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(host, ours, inputs, tolerance=FP32, grad_tolerance=None, trained=lora_parameters):
    """The same output and the same gradient of every trained tensor."""
    results = []
    for model in (host, ours):
        torch.manual_seed(11)
        results.append(outputs_and_grads(model, inputs, trained(model)))
    (expected, expected_grads), (actual, grads) = results
    assert relative_error(actual, expected) < tolerance
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < (grad_tolerance or tolerance), name


def randomise_trained(model):
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
