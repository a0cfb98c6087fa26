"""sd-scripts, which kohya's GUI and fluxgym run: its model and its LoRA network."""

from __future__ import annotations

from typing import Any

import torch

from fluxfast_bench.shapes import Shape
from fluxfast_bench.trainers.case import RANK, Case
from fluxfast_bench.trainers.hosts import bfl


def _network(shape: Shape, **options: Any) -> tuple[Any, Any]:
    """The frozen model, and the network on it."""
    from library.flux_models import Flux, FluxParams
    from networks import lora_flux

    model = Flux(FluxParams(**bfl.config_of(shape))).requires_grad_(False).train()
    network = lora_flux.create_network(1.0, RANK, RANK, None, [], model, **options)
    network.apply_to([], model, apply_text_encoder=False, apply_unet=True)
    return model, network.train()


def lora(shape: Shape) -> Case:
    model, network = _network(shape)
    return bfl.case_of(model, list(network.parameters()), shape)


def checkpointed(shape: Shape) -> Case:
    model, network = _network(shape)
    model.enable_gradient_checkpointing()
    return bfl.case_of(model, list(network.parameters()), shape)


def swapped(shape: Shape) -> Case:
    from library import custom_offloading_utils as offloading

    offloading.swap_weight_devices_no_cuda = bfl.copies(offloading.swap_weight_devices_no_cuda)
    model, network = _network(shape.with_model(num_single_layers=6))
    model.enable_gradient_checkpointing()
    model.enable_block_swap(1, torch.device("cpu"))
    case = bfl.case_of(model, list(network.parameters()), shape)
    forward = case.call

    def call() -> torch.Tensor:
        model.prepare_block_swap_before_forward()
        return forward()

    case.call = call
    return case


CASES = {
    "LoRA": lora,
    "LoRA, checkpointing": checkpointed,
    "LoRA, block swap": swapped,
}
