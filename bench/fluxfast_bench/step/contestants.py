"""What runs in a benchmark of a step: fluxfast in its modes, and its peers, built in the same way.

A model is made on the meta device. Then module by module is filled with random weights on the
device and quantised, so that no more than one block is ever there in full size. The adapters, the
loss and the optimiser are the same for all (`runner`).
"""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.lokr import lokr_shapes
from fluxfast.adapters.lora import add_lora
from fluxfast.adapters.presets import find_targets
from fluxfast.config.lycoris import LycorisOptions
from fluxfast.quant.rules import KEPT
from fluxfast_bench.counted.floor import Route
from fluxfast_bench.shapes import Shape

# what every contestant trains
TARGETS = "all+ffs"


def _lokr(factor: int) -> LycorisOptions:
    options = {"algo": "lokr", "factor": factor, "full_matrix": True}
    return LycorisOptions.model_validate(options)


# LoKr's options, as the quickstart recommends them
LOKR = _lokr(16)


def rank_equivalent(shapes: Sequence[Sequence[int]], rank: int) -> LycorisOptions:
    """A LoKr that trains about as many numbers as a LoRA of that rank.

    shapes: [out, in] of the linears that have it. The factor, of 2 to 16, is the one whose count is
    nearest to LoRA's by ratio: 12 for FLUX.1 beside rank 16, which trains 0.9 times as many, and 2
    for the small model, 1.4 times as many, where 4 is 0.3 times.
    """
    wanted = sum(rank * (n + k) for n, k in shapes)

    def off_by(options: LycorisOptions) -> float:
        of_linears = (lokr_shapes(n, k, options) for n, k in shapes)
        count = sum(math.prod(shape) for each in of_linears for shape in each.values())
        return abs(math.log(count / wanted))

    return min(map(_lokr, range(2, 17)), key=off_by)


def add_adapter(
    model: nn.Module, adapter: str, *, rank: int, dtype: torch.dtype, dropout: float = 0.0
) -> list[nn.Parameter]:
    """Freezes the model and puts a new adapter on it; returns what then trains.

    adapter: "LoRA", of that rank; "LoKr"; or "LoKr, rank-equivalent" to that LoRA.
    """
    if adapter == "LoRA":
        return add_lora(model, targets=TARGETS, rank=rank, dropout=dropout, dtype=dtype)
    names, lokr = find_targets(model, TARGETS), LOKR
    if adapter == "LoKr, rank-equivalent":
        linears = [model.get_submodule(name) for name in names]
        lokr = rank_equivalent([(m.out_features, m.in_features) for m in linears], rank)  # type: ignore[misc]
    by_module = dict.fromkeys(names, lokr)
    settings = AdapterSettings(TARGETS, rank, float(rank), dtype=dtype, by_module=by_module)
    KINDS["lycoris"].add(model, settings)
    return list(trainable_parameters(model).values())


def do_nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Setup:
    """What all contestants of a comparison have in common.

    shapes: of one model; one build of it steps on each in turn. ahead: whether ours compute
    modulation ahead; None is a run's "auto": everywhere but on a CPU.
    """

    shapes: tuple[Shape, ...]
    recompute: str
    rank: int
    optimizer: str
    device: torch.device
    ahead: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, adapters and activations."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def looks_ahead(self) -> bool:
        return self.device.type != "cpu" if self.ahead is None else self.ahead


def checkpointing(model: Any, setup: Setup) -> None:
    """The policies that diffusers has."""
    if setup.recompute not in ("none", "full"):
        raise ValueError(
            f"diffusers recomputes whole blocks or nothing: full or none, not {setup.recompute}"
        )
    if setup.recompute == "full":
        model.enable_gradient_checkpointing()


@dataclass(frozen=True)
class Contestant:
    """One way to train a LoRA.

    title: for tables. modules: what must be importable. storage: of the base's linears,
    `bytes_per_weight`; compute: of their products. quantize: a module on the device, in place;
    get_ready: the model with its adapters, as the setup has it. error: the most that its prediction
    and gradients may be off (`runner.verify`); with `exact`, on the weights as they are stored. The
    default suits bf16 arithmetic. cpu: whether it runs without a GPU. route: TREAD's.

    Of ours: streamed, whether blocks stream; graphs, whether a step is replayed; looks_ahead,
    whether modulation may be computed ahead; engine, of wide float products
    (`fluxfast_kernels.launch.WIDE_ENGINES`), None: the table's; transposes, whether stored codes
    have a transposed copy where the GPU's dgrad reads one; dropout, of the adapters, where nobody
    compares results; adapter, what trains, as in
    `add_adapter`.
    """

    name: str
    title: str
    model: type[nn.Module] = FluxTransformer2DModel
    modules: tuple[str, ...] = ()
    storage: str = "bf16"
    bytes_per_weight: float = 2.0
    compute: str = "float"
    quantize: Callable[[nn.Module], None] = do_nothing
    get_ready: Callable[[Any, Setup], None] = checkpointing
    error: float = 0.04
    exact: bool = False
    ours: bool = False
    cpu: bool = False
    route: Route | None = None
    streamed: bool = False
    graphs: bool = False
    looks_ahead: bool = True
    engine: str | None = None
    transposes: bool = True
    dropout: float = 0.0
    adapter: str = "LoRA"

    @property
    def quantised(self) -> bool:
        """Whether weights or products are in another format than activations."""
        return self.storage != "bf16" or self.compute != "float"

    def missing(self, device: torch.device) -> str | None:
        """Why it can't run here; None where it can."""
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        if device.type == "cpu" and not self.cpu:
            return "needs a GPU"
        return None


# what all are held against
REFERENCE = Contestant("reference", "diffusers + PEFT, fp32", cpu=True)


def build(
    contestant: Contestant, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Any:
    """The contestant's base with random weights, frozen and quantised.

    The weights are the same for all contestants on a kind of device.
    """
    with torch.device("meta"):
        model = contestant.model(**config)
    # not diffusers' own `to`, which warns of modules that must stay in fp32: there are none
    nn.Module.to(model.requires_grad_(False).train(), dtype)
    for name, child in model.named_children():
        for part_name, part in _parts(name, child):
            part.to_empty(device=device)
            _fill(part, part_name)
            if name not in KEPT:
                contestant.quantize(part)
    return model


def _parts(name: str, child: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(child, nn.ModuleList):
        return [(f"{name}.{i}", block) for i, block in enumerate(child)]
    return [(name, child)]


@torch.no_grad()
def _fill(module: nn.Module, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        # by name, so that every contestant has the same weights
        generator = torch.Generator(parameter.device).manual_seed(
            zlib.crc32(f"{prefix}.{name}".encode())
        )
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if parameter.ndim > 1:
            noise *= parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            noise *= 0.1
        else:
            noise = 1 + 0.1 * noise
        parameter.copy_(noise)
