"""musubi-tuner: its model of FLUX.1-Kontext, and its LoRA, LoHa and LoKr networks.

Its block swap asks CUDA which device is the current one, and can't run without.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fluxfast_bench.shapes import Shape
from fluxfast_bench.trainers.case import RANK, Case
from fluxfast_bench.trainers.hosts import bfl

# the folder of its checkout that its code is in
INSIDE = ("src",)


def _case(
    shape: Shape,
    module: str = "lora_flux",
    *,
    checkpointed: bool = False,
    offloads: bool = False,
    float8: bool = False,
) -> Case:
    from musubi_tuner.flux.flux_models import Flux, FluxParams

    model = Flux(FluxParams(**bfl.config_of(shape)), attn_mode="torch", split_attn=False)
    if float8:
        stored = model.fp8_optimization(model.state_dict(), torch.device("cpu"), False)
        model.load_state_dict(stored, strict=True, assign=True)
    model.requires_grad_(False).train()
    if checkpointed:
        model.enable_gradient_checkpointing(offloads)
    networks: Any = importlib.import_module(f"musubi_tuner.networks.{module}")
    network = networks.create_arch_network(1.0, RANK, RANK, None, [], model)
    network.apply_to([], model, apply_text_encoder=False, apply_unet=True)
    return bfl.case_of(model, list(network.train().parameters()), shape)


def lora(shape: Shape) -> Case:
    return _case(shape)


def checkpointed(shape: Shape) -> Case:
    return _case(shape, checkpointed=True)


def offloaded(shape: Shape) -> Case:
    return _case(shape, checkpointed=True, offloads=True)


def scaled_float8(shape: Shape) -> Case:
    return _case(shape, float8=True)


def loha(shape: Shape) -> Case:
    return _case(shape, "loha")


def lokr(shape: Shape) -> Case:
    return _case(shape, "lokr")


CASES = {
    "LoRA": lora,
    "LoRA, checkpointing": checkpointed,
    "LoRA, activations offloaded": offloaded,
    "LoRA, scaled float8 base": scaled_float8,
    "LoHa": loha,
    "LoKr": lokr,
}
