"""How long a training step takes on a GPU that need not be there: its FLOPs and bytes over what
such a GPU sustains.

A multiply-add is 2 FLOPs, a pass one read or write of a [tokens, dim] tensor. The base is frozen,
so a linear costs forward and the gradient of its input; attention's backward costs 2.5 of its
forward. A prediction, not a measurement: no launch gaps, no waiting for data, no clock that drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fluxfast.memory.gpus import Gpu
from fluxfast.memory.sizes import FluxSizes

# the parts of their peaks that products, attention forward and backward, memory and the link to the
# host sustain: measured ones of an H200, an RTX 3090 and an RTX 5090 lie between 0.57 (int8) and
# 0.92 (bf16) of them
GEMM, GEMM_8BIT, ATTENTION, ATTENTION_BACKWARD, BANDWIDTH, LINK = 0.82, 0.65, 0.72, 0.58, 0.9, 0.8
# a block's linears, in dim² a token; those that are computed again, double and single; adapters'
# elements a rank, in dim
LINEAR, AGAIN_DOUBLE, AGAIN_SINGLE, LORA_DOUBLE, LORA_SINGLE = 12, 8, 7, 18, 17
# passes of the fused ops of a double and a single block, adapters with them: forward, backward
PASSES_DOUBLE, PASSES_SINGLE = (21, 40), (17, 32)
# what quantising activations and gradients adds
PASSES_CODES = 3


@dataclass(frozen=True)
class BlockWork:
    """What one block computes: tokens it sees, whether it is a double block, its recompute policy."""

    tokens: int
    double: bool
    policy: str


@dataclass(frozen=True)
class StepTime:
    """Seconds of one forward and backward pass."""

    products: float
    attention: float
    memory: float
    transfers: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.transfers


@lru_cache(maxsize=4096)
def block_seconds(
    work: BlockWork, sizes: FluxSizes, gpu: Gpu, *, batch: int, rank: int, compute: str
) -> tuple[StepTime, StepTime]:
    """Forward and backward of a block whose weights are there."""
    d, rows = sizes.dim, work.tokens * batch
    eight = compute != "same"
    rate = gpu.rate(compute) * 1e12 * (GEMM_8BIT if eight else GEMM)
    plain, band = gpu.bf16 * 1e12, gpu.bandwidth * 1e9 * BANDWIDTH
    linear = 2 * LINEAR * d * d * rows / rate
    lora = 2 * rank * (LORA_DOUBLE if work.double else LORA_SINGLE) * d * rows / (plain * GEMM)
    attention = 4 * work.tokens**2 * d * batch / plain
    passes = [
        p + (PASSES_CODES if eight else 0)
        for p in (PASSES_DOUBLE if work.double else PASSES_SINGLE)
    ]
    forward, backward = (p * rows * d * 2 / band for p in passes)
    # of the forward pass, what backward runs again
    selective = (AGAIN_DOUBLE if work.double else AGAIN_SINGLE) / LINEAR
    again = {"none": 0.0, "selective": selective, "full": selective}[work.policy]
    return (
        StepTime(linear + lora, attention / ATTENTION, forward, 0.0),
        StepTime(
            linear * (1 + again) + lora * (2 + again),
            attention
            * (2.5 / ATTENTION_BACKWARD + (1 / ATTENTION if work.policy == "full" else 0.0)),
            backward + forward * again,
            0.0,
        ),
    )


def step_seconds(
    works: Sequence[BlockWork],
    sizes: FluxSizes,
    gpu: Gpu,
    *,
    batch: int,
    rank: int,
    compute: str,
    streamed: Sequence[int] = (),
    modulation: int = 0,
) -> StepTime:
    """Forward and backward through all blocks; streamed: bytes of each block that come over the
    link, once a direction.

    What of them does not hide behind the block's own computing is in `transfers`. modulation: bytes
    of weights that are read for it from the GPU's memory.
    """
    link = gpu.pcie * 1e9 * LINK
    products = attention = memory = transfers = 0.0
    for direction in (0, 1):
        waiting = 0.0
        for index, work in enumerate(works):
            time = block_seconds(work, sizes, gpu, batch=batch, rank=rank, compute=compute)[
                direction
            ]
            products, attention, memory = (
                products + time.products,
                attention + time.attention,
                memory + time.memory,
            )
            # copies run one after the other beside the computing, so what one block hides another
            # may be short of
            waiting += (streamed[index] / link if streamed else 0.0) - time.total
        transfers += max(0.0, waiting)
    memory += modulation / (gpu.bandwidth * 1e9 * BANDWIDTH)
    return StepTime(products, attention, memory, transfers)
