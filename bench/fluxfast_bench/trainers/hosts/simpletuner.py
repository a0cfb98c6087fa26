"""SimpleTuner: its own model, with PEFT's LoRA or a network of LyCORIS."""

from __future__ import annotations

from typing import Any

from torch import nn

from fluxfast_bench.shapes import Shape
from fluxfast_bench.trainers.case import RANK, Case
from fluxfast_bench.trainers.hosts.diffusers_peft import TARGETS, case_of


def _model(shape: Shape, **options: Any) -> Any:
    from simpletuner.helpers.models.flux.transformer import FluxTransformer2DModel

    return FluxTransformer2DModel(**shape.config, **options).requires_grad_(False).train()


def _lora(model: Any, shape: Shape) -> Case:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS))
    return case_of(model, [p for p in model.parameters() if p.requires_grad], shape)


def lora(shape: Shape) -> Case:
    return _lora(_model(shape), shape)


def checkpointed(shape: Shape) -> Case:
    model = _model(shape)
    model.enable_gradient_checkpointing()
    return _lora(model, shape)


def tread(shape: Shape) -> Case:
    from simpletuner.helpers.training.tread import TREADRouter

    model = _model(shape)
    # tokens are drawn from a generator of the router's own
    router = TREADRouter(seed=0, device="cpu")
    model.set_router(router, [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}])
    case = _lora(model, shape)

    def call() -> Any:
        router.generator.manual_seed(0)
        return forward()

    forward, case.call = case.call, call
    return case


def lycoris(shape: Shape, **options: Any) -> Case:
    from lycoris import LycorisNetwork, create_lycoris

    model: nn.Module = _model(shape)
    LycorisNetwork.apply_preset({"target_module": ["Attention", "FeedForward"]})
    network = create_lycoris(model, 1.0, linear_dim=RANK, linear_alpha=RANK, **options)
    network.apply_to()
    return case_of(model, list(network.parameters()), shape)


def lokr(shape: Shape) -> Case:
    return lycoris(shape, algo="lokr", factor=8)


def loha(shape: Shape) -> Case:
    return lycoris(shape, algo="loha")


CASES = {
    "LoRA": lora,
    "LoRA, checkpointing": checkpointed,
    "LoRA, TREAD": tread,
    "LyCORIS LoKr": lokr,
    "LyCORIS LoHa": loha,
}
