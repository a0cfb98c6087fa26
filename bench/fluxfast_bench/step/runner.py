"""A contestant at work: built with adapters and an optimiser, found to be right, and stepping."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.graphs import STEPS_RUN_FIRST
from fluxfast.model.modulation import Conditions
from fluxfast.model.pinned import pin, send
from fluxfast.quant.linear import QuantLinear
from fluxfast.train.optim import clip_gradients
from fluxfast_bench.shapes import Shape, model_inputs
from fluxfast_bench.step.contestants import REFERENCE, Contestant, Setup, add_adapter, build

OPTIMIZERS = ("torch-adamw", "adamw8bit")
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 2.0
# relative errors of fp32 arithmetic in another order, summed over the tokens
FP32_ERROR = 1e-4
# what modulation is a function of: computed ahead, it is on the host
CONDITIONS = ("timestep", "guidance", "pooled_projections")
# a step whose graph has been captured and compared is replayed from the next one on
STEPS_BEFORE_REPLAY = STEPS_RUN_FIRST + 2
# noise levels that steps take in turn, each exact in bf16: of one that stayed, modulation would be
# computed once
LEVELS = 63


class WrongResult(Exception):
    """A contestant does not compute what it should; what it was measured to do means nothing."""


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, lr=LEARNING_RATE)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def flow_loss(model: Any, inputs: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of the prediction, and the prediction."""
    prediction = model(**inputs, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction.float(), target.float()), prediction


def loss_target(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.img, shape.config["in_channels"])
    return torch.randn(size, generator=generator).to(device)


@contextmanager
def engine_of(contestant: Contestant) -> Iterator[None]:
    """Wide float products run on the contestant's engine, where it names one."""
    if contestant.engine is None:
        yield
        return
    from fluxfast_kernels.launch import WIDE_ENGINES

    before = WIDE_ENGINES["float"]
    WIDE_ENGINES["float"] = {"default": ((None, contestant.engine),)}
    try:
        yield
    finally:
        WIDE_ENGINES["float"] = before


class Batches:
    """A shape's batch on the host, as a loader leaves it, and on its way to the device.

    Each step has another noise level, as in a run.
    """

    def __init__(self, shape: Shape, setup: Setup, ahead: bool) -> None:
        host = torch.device("cpu")
        self._setup, self._ahead = setup, ahead
        inputs = model_inputs(shape, host, setup.dtype)
        self._ids = {name: inputs.pop(name).to(setup.device) for name in ("img_ids", "txt_ids")}
        self._host = {name: pin(x, setup.device) for name, x in inputs.items()}
        self._target = pin(loss_target(shape, host), setup.device)
        self._levels = [
            pin(
                (((number + 7 * torch.arange(shape.batch)) % LEVELS + 1) / (LEVELS + 1)).to(
                    setup.dtype
                ),
                setup.device,
            )
            for number in range(LEVELS)
        ]

    def conditions(self, number: int) -> Conditions:
        """What modulation is made of in step `number`."""
        host = self._host
        return Conditions.of(
            self._level(number), host["guidance"], host["pooled_projections"], self._setup.dtype
        )

    def _level(self, number: int) -> Tensor:
        return self._levels[number % LEVELS]

    def batch(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Step `number`'s inputs and target, on the device but for what is wanted on the host."""
        inputs = {**self._host, "timestep": self._level(number)}
        there = {
            name: x if self._ahead and name in CONDITIONS else send(x, self._setup.device)
            for name, x in inputs.items()
        }
        return there | self._ids, send(self._target, self._setup.device)


class Runner:
    """One contestant, built, on its device; `begin` chooses the shape that it steps on."""

    def __init__(self, contestant: Contestant, setup: Setup) -> None:
        torch.manual_seed(0)
        self.contestant, self.setup = contestant, setup
        self.model: Any = build(contestant, setup.shapes[0].config, setup.device, setup.dtype)
        self.parameters = add_adapter(
            self.model,
            contestant.adapter,
            rank=setup.rank,
            dropout=contestant.dropout,
            dtype=setup.dtype,
        )
        with engine_of(contestant):
            contestant.get_ready(self.model, setup)
        if contestant.route is not None:
            self.model.set_routes([contestant.route.as_config()])
        self.gradients = FlatGradients(self.model) if contestant.ours else None
        self.optimizer = make_optimizer(setup.optimizer, self.parameters)
        ahead = getattr(self.model, "modulation", None) is not None
        self._batches = {shape.name: Batches(shape, setup, ahead) for shape in setup.shapes}
        self.number = 0
        self.begin(setup.shapes[0])

    def begin(self, shape: Shape) -> None:
        """The next steps are on this shape; the modulation of the first is ready afterwards."""
        self._of = self._batches[shape.name]
        if (modulation := getattr(self.model, "modulation", None)) is not None:
            modulation.forget()
            self._look_ahead()
            # waits for what was prepared, and keeps it
            modulation.flat_vectors(
                self._of.conditions(self.number), self.setup.device, self.setup.dtype
            )

    def _look_ahead(self) -> None:
        if getattr(self.model, "modulation", None) is not None:
            number, batches = self.number, self._of
            self.model.prepare_modulation(lambda: batches.conditions(number))

    def loss(self) -> Tensor:
        """Of the next batch; the one after it is prepared meanwhile, as a run does."""
        inputs, target = self._of.batch(self.number)
        self.number += 1
        self._look_ahead()
        with engine_of(self.contestant):
            return flow_loss(self.model, inputs, target)[0]

    def backward(self, loss: Tensor) -> None:
        with engine_of(self.contestant):
            loss.backward()
        if self.gradients is not None:
            self.gradients.take()
            self.gradients.hand_over()

    def step(self) -> Tensor:
        """Forward, backward, clip, update, zero; returns the loss without waiting for it."""
        loss = self.loss()
        self.backward(loss)
        if self.gradients is None:
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        else:
            clip_gradients(self.gradients.buffers, "norm", MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def verify(contestant: Contestant, setup: Setup) -> float:
    """The relative error of a shallow model's prediction or of its adapters' gradients, the larger.

    It is taken on every shape, against diffusers + PEFT in fp32. Where the contestant is `exact`,
    the reference has the weights as they are stored, else those that were quantised. TREAD's
    routes, which leave tokens out at random, are not part of it. Raises WrongResult where the error
    is larger than the contestant's arithmetic explains, and where a quantised base gives what the
    original one does.
    """
    config = setup.shapes[0].shallow().config
    model: Any = build(contestant, config, setup.device, setup.dtype)
    reference: Any = build(REFERENCE, config, setup.device, torch.float32)
    _copy_weights(model, reference, setup.dtype, stored=contestant.exact)
    subjects = []
    unchecked = replace(setup, recompute="none")
    for subject, runs, dtype in (
        (model, contestant, setup.dtype),
        (reference, REFERENCE, torch.float32),
    ):
        parameters = add_adapter(subject, contestant.adapter, rank=setup.rank, dtype=dtype)
        _randomise(parameters, setup.dtype)
        with engine_of(runs):
            runs.get_ready(subject, setup if runs is contestant else unchecked)
        subjects.append((subject, runs, parameters, dtype))
    return max(_error(contestant, setup, shape, subjects) for shape in setup.shapes)


def _error(
    contestant: Contestant, setup: Setup, shape: Shape, subjects: list[tuple[Any, ...]]
) -> float:
    results = []
    for subject, runs, parameters, dtype in subjects:
        inputs = {
            name: x.to(dtype) for name, x in model_inputs(shape, setup.device, setup.dtype).items()
        }
        if getattr(subject, "modulation", None) is not None:
            inputs |= {name: inputs[name].cpu() for name in CONDITIONS}
        with engine_of(runs):
            for _ in range(1 + (STEPS_BEFORE_REPLAY if runs.graphs else 0)):
                for parameter in parameters:
                    parameter.grad = None
                loss, prediction = flow_loss(subject, inputs, loss_target(shape, setup.device))
                loss.backward()
        check_replayed(subject, runs)
        gradients = [p.grad for p in parameters]
        assert all(gradient is not None for gradient in gradients)
        flat = torch.cat(
            [gradient.flatten().double() for gradient in gradients if gradient is not None]
        )
        results.append((prediction.detach().double(), flat))
    error = max(_relative(actual, expected) for actual, expected in zip(*results, strict=True))
    computes_fp32 = setup.dtype == torch.float32 and contestant.compute == "float"
    bound = (
        FP32_ERROR
        if computes_fp32 and (contestant.exact or not contestant.quantised)
        else contestant.error
    )
    # a NaN compares as false
    if not error <= bound:
        raise WrongResult(
            f"wrong: relative error {error:.2g}, where its arithmetic explains {bound:g}"
        )
    if contestant.quantised and not contestant.exact and error < FP32_ERROR:
        raise WrongResult(f"relative error {error:.2g}: nothing was quantised")
    return error


def check_replayed(model: Any, contestant: Contestant) -> None:
    """Raises WrongResult where steps were to be replayed by now, and are not."""
    if contestant.graphs and (model.graphs is None or not model.graphs.replays):
        raise WrongResult("its steps are not replayed")


@torch.no_grad()
def _copy_weights(
    model: nn.Module, reference: nn.Module, dtype: torch.dtype, *, stored: bool
) -> None:
    """Rounds the reference's weights to `dtype`; with `stored` it gets the model's decoded ones."""
    for parameter in reference.parameters():
        parameter.copy_(parameter.to(dtype))
    for name, module in model.named_modules():
        if stored and isinstance(module, QuantLinear):
            reference.get_parameter(f"{name}.weight").copy_(module.packed().to(torch.float32))


@torch.no_grad()
def _randomise(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    # a fresh adapter's B is zero, which hides errors
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator) * (
            0.5 * parameter.shape[1] ** -0.5
        )
        parameter.copy_(noise.to(dtype))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def free(device: torch.device) -> None:
    """Returns what nobody holds any more to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
