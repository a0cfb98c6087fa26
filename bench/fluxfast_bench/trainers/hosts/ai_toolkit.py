"""ai-toolkit: diffusers' model with a network of its own, and its layer offloading."""

from __future__ import annotations

from typing import Any

import torch

from fluxfast_bench.shapes import Shape
from fluxfast_bench.trainers.case import RANK, Case
from fluxfast_bench.trainers.hosts.diffusers_peft import case_of, transformer


def _case(shape: Shape, kind: str, *, offloads: bool = False) -> Case:
    from toolkit.config_modules import NetworkConfig
    from toolkit.lora_special import LoRASpecialNetwork

    model: Any = transformer(shape)
    if offloads:
        from toolkit.memory_management import MemoryManager

        MemoryManager.attach(model, torch.device("cpu"))
    config = NetworkConfig(type=kind, linear=RANK, linear_alpha=RANK)
    network: Any = LoRASpecialNetwork(
        text_encoder=None,
        unet=model,
        lora_dim=config.linear,
        alpha=config.linear_alpha,
        train_text_encoder=False,
        is_flux=True,
        target_lin_modules=["FluxTransformer2DModel"],
        network_type=kind,
        transformer_only=True,
        network_config=config,
    )
    network.apply_to(None, model, False, True)
    network.force_to(torch.device("cpu"), torch.float32)
    # it makes a tensor of a multiplier that is another one than before
    network.multiplier = 0.0
    network.multiplier, network.is_active = 1.0, True
    # its modules hold it weakly
    model.__dict__["network"] = network
    return case_of(model, list(network.train().parameters()), shape)


def lora(shape: Shape) -> Case:
    return _case(shape, "lora")


def lokr(shape: Shape) -> Case:
    return _case(shape, "lokr")


def dora(shape: Shape) -> Case:
    return _case(shape, "dora")


def offloaded(shape: Shape) -> Case:
    return _case(shape, "lora", offloads=True)


CASES = {"LoRA": lora, "LoKr": lokr, "DoRA": dora, "LoRA, layer offloading": offloaded}
