"""A contestant at work: its model with adapters, a loss, an optimiser; its correctness, and one whole optimisation step."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.adapters.lora import add_lora
from fluxfast.quant.linear import QuantLinear
from fluxfast_bench.cases import Shape, model_inputs
from fluxfast_bench.contestants import REFERENCE, Contestant, build

OPTIMIZERS = ("torch-adamw", "adamw8bit")
TARGETS = "all+ffs"
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 2.0
# relative errors of fp32 arithmetic in another order, summed over the tokens
FP32_ERROR = 1e-4
# of the full width, as deep as it takes to have every kind of block
SHALLOW = {"num_layers": 1, "num_single_layers": 1}


class WrongResult(Exception):
    """A contestant does not compute what it should; what it was measured to do means nothing."""


@dataclass(frozen=True)
class Setup:
    """What all contestants of a case have in common."""

    shape: Shape
    recompute: str
    rank: int
    optimizer: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, adapters and activations."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, lr=LEARNING_RATE)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def flow_loss(model: Any, inputs: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of the prediction, and the prediction."""
    prediction = model(**inputs, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction.float(), target.float()), prediction


def loss_target(setup: Setup) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (setup.shape.batch, setup.shape.img, setup.shape.config["in_channels"])
    return torch.randn(size, generator=generator).to(setup.device)


class Runner:
    """One contestant, built, on its device."""

    def __init__(self, contestant: Contestant, setup: Setup) -> None:
        torch.manual_seed(0)
        self.model: Any = build(contestant, setup.shape.config, setup.device, setup.dtype)
        self.parameters = add_lora(self.model, targets=TARGETS, rank=setup.rank, dtype=setup.dtype)
        contestant.policy(self.model, setup.recompute)
        contestant.finish(self.model)
        if contestant.route is not None:
            self.model.set_routes([contestant.route.as_config()])
        self.optimizer = make_optimizer(setup.optimizer, self.parameters)
        self.inputs = model_inputs(setup.shape, setup.device, setup.dtype)
        self.target = loss_target(setup)

    def step(self) -> Tensor:
        """Forward, backward, clip, update, zero; returns the loss without waiting for it."""
        loss, _ = flow_loss(self.model, self.inputs, self.target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def verify(contestant: Contestant, setup: Setup) -> float:
    """The relative error of the prediction and of the adapters' gradients, whichever is larger, of a shallow model.

    Against diffusers + PEFT in fp32, on the weights as they are stored where the contestant is `exact`, else on those that
    were quantised. Raises WrongResult where that is beyond what the contestant's arithmetic explains, and where a
    quantised base gives what the original one does. TREAD's routes, which leave tokens out at random, are not part of it.
    """
    config = setup.shape.config | SHALLOW
    model: Any = build(contestant, config, setup.device, setup.dtype)
    reference: Any = build(REFERENCE, config, setup.device, torch.float32)
    _copy_weights(model, reference, setup.dtype, stored=contestant.exact)
    results = []
    for subject, runs, dtype in ((model, contestant, setup.dtype), (reference, REFERENCE, torch.float32)):
        parameters = add_lora(subject, targets=TARGETS, rank=setup.rank, dtype=dtype)
        _randomise(parameters, setup.dtype)
        runs.policy(subject, setup.recompute if runs is contestant else "none")
        runs.finish(subject)
        inputs = model_inputs(setup.shape, setup.device, setup.dtype)
        loss, prediction = flow_loss(subject, {name: x.to(dtype) for name, x in inputs.items()}, loss_target(setup))
        loss.backward()
        gradients = [p.grad for p in parameters]
        assert all(gradient is not None for gradient in gradients)
        flat = torch.cat([gradient.flatten().double() for gradient in gradients if gradient is not None])
        results.append((prediction.detach().double(), flat))
    error = max(_relative(actual, expected) for actual, expected in zip(*results, strict=True))
    computes_fp32 = setup.dtype == torch.float32 and contestant.compute == "float"
    bound = FP32_ERROR if computes_fp32 and (contestant.exact or not contestant.quantised) else contestant.error
    # a NaN compares as false
    if not error <= bound:
        raise WrongResult(f"wrong: relative error {error:.2g}, where its arithmetic explains {bound:g}")
    if contestant.quantised and not contestant.exact and error < FP32_ERROR:
        raise WrongResult(f"relative error {error:.2g}: nothing was quantised")
    return error


@torch.no_grad()
def _copy_weights(model: nn.Module, reference: nn.Module, dtype: torch.dtype, *, stored: bool) -> None:
    """The reference's weights become what they are in `dtype`, and where `stored` what the model's quantised linears hold."""
    for parameter in reference.parameters():
        parameter.copy_(parameter.to(dtype))
    for name, module in model.named_modules():
        if stored and isinstance(module, QuantLinear):
            reference.get_parameter(f"{name}.weight").copy_(module.packed().dequantize(torch.float32))


@torch.no_grad()
def _randomise(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    # a fresh adapter's B is zero, which hides errors
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator) * (0.5 * parameter.shape[1] ** -0.5)
        parameter.copy_(noise.to(dtype))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def free(device: torch.device) -> None:
    """Returns what nobody holds any more to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
