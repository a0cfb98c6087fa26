"""diffusers' own model with PEFT's adapters, as diffusers' scripts train it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

from fluxfast_bench.shapes import Shape, model_inputs
from fluxfast_bench.trainers.case import RANK, Case

# every linear of the blocks that is no modulation's
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),
]


def transformer(shape: Shape) -> nn.Module:
    """A frozen model of diffusers' own class, in training."""
    return FluxTransformer2DModel(**shape.config).requires_grad_(False).train()


def case_of(model: Any, trained: list[nn.Parameter], shape: Shape, **more: Any) -> Case:
    """A case of a model that takes diffusers' arguments."""
    inputs = model_inputs(shape, torch.device("cpu"), torch.float32)
    return Case(model, trained, lambda: model(**inputs, **more, return_dict=False)[0])


def _with(config: Any, shape: Shape, *, checkpointed: bool = False) -> Case:
    model: Any = transformer(shape)
    if checkpointed:
        model.enable_gradient_checkpointing()
    return _add(model, config, shape)


def _add(model: Any, config: Any, shape: Shape) -> Case:
    model.add_adapter(config)
    return case_of(model, [p for p in model.parameters() if p.requires_grad], shape)


def lora(shape: Shape) -> Case:
    return _with(LoraConfig(r=RANK, target_modules=TARGETS), shape)


def checkpointed(shape: Shape) -> Case:
    return _with(LoraConfig(r=RANK, target_modules=TARGETS), shape, checkpointed=True)


def dora(shape: Shape) -> Case:
    return _with(LoraConfig(r=RANK, target_modules=TARGETS, use_dora=True), shape)


def lokr(shape: Shape) -> Case:
    return _with(LoKrConfig(r=RANK, target_modules=TARGETS), shape)


def nf4(shape: Shape) -> Case:
    """Over bitsandbytes' nf4, as scripts quantise with `BitsAndBytesConfig`."""
    import bitsandbytes as bnb

    model: Any = transformer(shape)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "blocks." in name:
            stored = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            stored.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            ).to("cpu")
            stored.bias = linear.bias
            model.set_submodule(name, stored)
    return _add(model, LoraConfig(r=RANK, target_modules=TARGETS), shape)


def loha(shape: Shape) -> Case:
    return _with(LoHaConfig(r=RANK, target_modules=TARGETS), shape)


CASES = {
    "LoRA": lora,
    "LoRA, checkpointing": checkpointed,
    "LoRA, nf4 base": nf4,
    "DoRA": dora,
    "LoKr": lokr,
    "LoHa": loha,
}
