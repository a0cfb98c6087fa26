"""How long a training step takes on a GPU that need not be there.

It is the step's FLOPs and bytes over what such a GPU sustains. A multiply-add is 2 FLOPs, a pass is
one read or write of a [tokens, dim] tensor. The base is frozen, so a linear costs its forward and
the gradient of its input; attention's backward costs 2.5 times its forward. This predicts and does
not measure: there are no gaps between launches, no waiting for data and no clock that drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fluxfast.memory.gpus import Gpu
from fluxfast.memory.sizes import FluxSizes

# the part of its peak that each of these sustains: products, 8-bit products, attention forward and
# backward, memory, the link to the host. Measured on an H200, an RTX 3090 and an RTX 5090, products
# reach between 0.57 (int8) and 0.92 (bf16) of their peaks
GEMM, GEMM_8BIT, ATTENTION, ATTENTION_BACKWARD, BANDWIDTH, LINK = 0.82, 0.65, 0.72, 0.58, 0.9, 0.8
# multiply-adds a token: of a block's linears, and of those that are computed again in a double and
# a single block, in dim²; of its adapters, double and single, in rank · dim
LINEAR, AGAIN_DOUBLE, AGAIN_SINGLE, LORA_DOUBLE, LORA_SINGLE = 12, 8, 7, 18, 17
# passes of the fused ops and adapters in a block's forward and its backward
PASSES_DOUBLE, PASSES_SINGLE = (21, 40), (17, 32)
# passes that quantising activations and gradients adds
PASSES_CODES = 3


@dataclass(frozen=True)
class BlockWork:
    """What one block computes: the tokens it sees, its kind and its recompute policy."""

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
    """Forward and backward of a block whose weights are on the device."""
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
    """Forward and backward through all blocks.

    streamed: bytes of each block that come over the link, once in each direction; the time of these
    copies that computing does not hide is in `transfers`. modulation: bytes of its weights that are
    read from the GPU's memory.
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
            # copies run one after the other beside the computing, so a block that computes for
            # longer than it copies hides the copies of another
            waiting += (streamed[index] / link if streamed else 0.0) - time.total
        transfers += max(0.0, waiting)
    memory += modulation / (gpu.bandwidth * 1e9 * BANDWIDTH)
    return StepTime(products, attention, memory, transfers)
