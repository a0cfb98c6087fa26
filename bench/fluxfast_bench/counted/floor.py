"""The least time that a LoRA training step can take on a device.

It is the model's FLOPs and bytes over the rates that were measured on the device. A multiply-add is
2 FLOPs. A pass is one read or write of a [tokens, dim] tensor of activations. The base is frozen,
so a linear costs its forward and the gradient of its input, never that of its weight. Attention's
backward costs 2.5 times its forward (FlashAttention). Modulation is not counted, because it depends
on nothing that a step computes.

There are three recompute policies for a block. "none" keeps everything. "full" keeps the block's
input and runs its whole forward again, as torch's checkpointing does. "selective" also keeps
attention's output, and recomputes neither it nor the block's last linears, whose outputs no
gradient needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluxfast_bench.shapes import Shape

RECOMPUTE = ("none", "selective", "full")
ATTENTION_BACKWARD = 2.5
# a block's linears, in dim² a token: q k v out, MLP in, MLP out (the single block's last takes
# attention's output as well)
LINEAR = 12
# of those, what "selective" recomputes: all but the double block's second MLP linear, or the single
# block's last
RECOMPUTED_DOUBLE, RECOMPUTED_SINGLE = 8, 7
# Σ (in + out) of a block's linears in dim, per token: what a LoRA of rank r multiplies r by
LORA_DOUBLE, LORA_SINGLE = 18, 17


@dataclass(frozen=True)
class Passes:
    """Passes of a block's memory-bound ops, if all of them are fused as the design has it.

    `backward` includes the passes of the LoRA.
    """

    forward: float
    backward: float


DOUBLE_PASSES, SINGLE_PASSES = Passes(14, 24 + 9), Passes(11, 18 + 8)
# what quantising activations adds to them, a forward or backward: half a pass for each linear's
# input
CODES_DOUBLE, CODES_SINGLE = 9.0, 7.0


@dataclass(frozen=True)
class Work:
    """What one step has to do.

    `linear`, `attention_forward`, `attention_backward` and `lora` are FLOPs, of the base's linears,
    of attention and of the adapters; `bytes` is the traffic of everything else.
    """

    linear: float
    attention_forward: float
    attention_backward: float
    lora: float
    bytes: float


@dataclass(frozen=True)
class Route:
    """TREAD: `ratio` of the image tokens skips all but the first and the last `outside` blocks."""

    ratio: float
    outside: int = 2

    def as_config(self) -> dict[str, float]:
        """As `tread_config` has it."""
        return {
            "selection_ratio": self.ratio,
            "start_layer_idx": self.outside,
            "end_layer_idx": -self.outside - 1,
        }


def step_work(
    shape: Shape,
    recompute: str,
    *,
    rank: int = 16,
    itemsize: int = 2,
    codes: bool = False,
    route: Route | None = None,
) -> Work:
    """What a step on `shape` must do at least; `codes`: linears run on 8-bit activations."""
    again = {"none": 0.0, "selective": 1.0, "full": 1.0}[recompute]
    total = [0.0] * 5
    blocks, singles = shape.config["num_layers"], shape.config["num_single_layers"]
    for index in range(blocks + singles):
        double = index < blocks
        routed = route is not None and route.outside <= index < blocks + singles - route.outside
        img = int(shape.img * (1 - route.ratio)) if routed and route is not None else shape.img
        work = _block(shape, img + shape.txt, double, recompute, again, rank, itemsize, codes)
        total = [a + b for a, b in zip(total, work, strict=True)]
    return Work(*total)


def _block(
    shape: Shape,
    tokens: int,
    double: bool,
    recompute: str,
    again: float,
    rank: int,
    itemsize: int,
    codes: bool,
) -> list[float]:
    rows, dim = tokens * shape.batch, shape.dim
    recomputed = again * LINEAR
    if recompute == "selective":
        recomputed = RECOMPUTED_DOUBLE if double else RECOMPUTED_SINGLE
    linear = 2 * dim**2 * rows * (2 * LINEAR + recomputed)
    attention = 4 * tokens**2 * dim * shape.batch
    lora = 2 * rank * (LORA_DOUBLE if double else LORA_SINGLE) * dim * rows
    passes = DOUBLE_PASSES if double else SINGLE_PASSES
    moved = passes.forward * (1 + again) + passes.backward
    if codes:
        moved += (CODES_DOUBLE if double else CODES_SINGLE) * (1 + again / 2)
    return [
        linear,
        attention * (2 if recompute == "full" else 1),
        attention * ATTENTION_BACKWARD,
        lora * (3 + again),
        moved * rows * dim * itemsize,
    ]


def floor_seconds(work: Work, ceilings: Mapping[str, float], compute: str) -> float:
    """Seconds of `work` at the rates of `ceilings`, as `ops.ceilings.measure` returns them.

    compute: what the base's linears run in, "float", "int8" or "e4m3".
    """
    plain = ceilings["float"]
    return (
        work.linear / ceilings.get(compute, plain)
        + work.lora / plain
        + work.attention_forward / ceilings["attention_forward"]
        + work.attention_backward / ceilings["attention_backward"]
        + work.bytes / ceilings["copy"]
    )
