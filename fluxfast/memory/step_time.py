"""How long a training step takes on a GPU that need not be there.

What each block does is counted (`block_work`); what a GPU sustains is data (`rates`). A wide
product takes whole waves of tiles (`fluxfast_kernels.waves`), and never less than its bytes.
Attention takes its FLOPs, of which its backward has 2.5 times those of its forward. An adapter's
thin products take their bytes or their FLOPs, and all else its bytes. Between two kernels is a gap;
without a CUDA graph the GPU also waits for the host where launching takes longer than computing.
Copies of streamed blocks run beside the computing and show where it does not hide them.

This predicts and does not measure. Caches that hold a tensor from one kernel to the next are not in
it, nor a clock that drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.memory.block_work import Work, block_work
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.launched import Product
from fluxfast.memory.rates import rates_of
from fluxfast.memory.sizes import Workload
from fluxfast.model.apply import Choices
from fluxfast_kernels import waves

# of a StepTime, what adds up to the step
PARTS = ("products", "attention", "memory", "launches", "transfers", "update")
# FlashAttention's five products against the forward's two
ATTENTION_BACKWARD = 2.5


class BlockTime(NamedTuple):
    """Seconds of a block in one direction, and how many kernels it launches."""

    products: float
    attention: float
    memory: float
    launches: int

    @property
    def seconds(self) -> float:
        """Without what lies between the kernels."""
        return self.products + self.attention + self.memory


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        products: wide products.
        attention: forward and backward.
        memory: everything that waits for memory.
        launches: between kernels, and waiting for the host to launch them.
        transfers: copies over the link that computing does not hide.
        update: of the adapters' weights, once in an optimiser's step.
        host: what the host launches for, beside all that; 0 with a graph.
    """

    products: float
    attention: float
    memory: float
    launches: float
    transfers: float
    update: float
    host: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    def of_batches(self, number: int) -> dict[str, float]:
        """Seconds of an optimiser's step of so many batches, by part."""
        return {part: getattr(self, part) * (1 if part == "update" else number) for part in PARTS}


@lru_cache(maxsize=65536)
def product_seconds(product: Product, nbytes: int, gpu: Gpu) -> float:
    """Seconds of one wide product. Raises ValueError where the GPU has none of its kind."""
    rates, kind = rates_of(gpu), product.kind.removesuffix("_persistent")
    plain = kind.removesuffix("_t")
    if plain not in rates:
        raise ValueError(f"{gpu.name} has no tensor cores for {plain}")
    # in 16 bits, the order of the weight's elements makes no difference
    rate = rates.get(kind, rates[plain]).value
    if kind == "library":
        computing = product.flops / rate
    else:
        shape = product.rows, product.cols, product.k
        tile = waves.best(product.kind, *shape, gpu.arch, gpu.multiprocessors).tile
        computing = waves.product_seconds(
            *shape,
            tile,
            rate=rate,
            multiprocessors=gpu.multiprocessors,
            streams=product.kind.endswith("_persistent"),
        )
    return max(computing, nbytes / rates["memory"].value)


@lru_cache(maxsize=4096)
def block_seconds(
    workload: Workload, index: int, recompute: str, gpu: Gpu, transposed_codes: bool = False
) -> tuple[BlockTime, BlockTime]:
    """Forward and backward of the block `index`, whose weights are on the device."""
    forward, backward = block_work(workload, index, recompute, gpu.arch, transposed_codes)
    return _seconds(forward, gpu), _seconds(backward, gpu)


def _seconds(work: Work, gpu: Gpu) -> BlockTime:
    rates = {name: rate.value for name, rate in rates_of(gpu).items()}
    thin = sum(max(nbytes / rates["memory"], flops / rates["half"]) for nbytes, flops in work.thin)
    return BlockTime(
        products=sum(
            product_seconds(product, nbytes, gpu) * count
            for (product, nbytes), count in work.products.items()
        ),
        attention=work.attention / rates["attention"]
        + ATTENTION_BACKWARD * work.attention_backward / rates["attention_backward"],
        memory=work.moved / rates["memory"] + thin,
        launches=work.launches,
    )


def step_seconds(
    workload: Workload, choices: Choices, gpu: Gpu, *, streamed: Sequence[int] = ()
) -> StepTime:
    """Forward, backward and update of a step.

    streamed: bytes of each block that come over the link, once in each direction.
    """
    rates = {name: rate.value for name, rate in rates_of(gpu).items()}
    blocks = [
        block_seconds(workload, index, policy, gpu, choices.transposed_codes)
        for index, policy in enumerate(choices.recompute)
    ]
    every = [time for block in blocks for time in block]
    memory, launches = sum(time.memory for time in every), sum(time.launches for time in every)
    if not choices.modulation_ahead:
        memory += sum(workload.modulation_weights) / rates["memory"]
        launches += sum(
            linear.is_modulation
            for index in range(workload.sizes.blocks)
            for linear in workload.sizes.block_linears(index)
        )
    found = StepTime(
        products=sum(time.products for time in every),
        attention=sum(time.attention for time in every),
        memory=memory,
        launches=launches * rates["gap"],
        transfers=_transfers(workload, choices, blocks, streamed, rates),
        update=_update_bytes(workload) / rates["memory"],
        host=0.0 if choices.graphs else launches * rates["launch"],
    )
    late = max(0.0, found.host - found.total)
    return replace(found, launches=found.launches + late)


def _transfers(
    workload: Workload,
    choices: Choices,
    blocks: Sequence[tuple[BlockTime, BlockTime]],
    streamed: Sequence[int],
    rates: Mapping[str, float],
) -> float:
    """Seconds of copies over the link that the computing does not hide; and those that all copies
    take of the memory's time.
    """
    inputs = [0] * len(blocks)
    if choices.host_inputs:
        width = workload.batch * workload.sizes.dim * workload.storage.itemsize
        inputs = [tokens * width for tokens in workload.tokens]
    weights = streamed or [0] * len(blocks)
    # the link carries both ways at a time: forward, weights come and inputs go
    link = rates["link"]
    forward = max(_shown(blocks, 0, copied, choices, link) for copied in (weights, inputs))
    both = [a + b for a, b in zip(weights, inputs, strict=True)]
    backward = _shown(blocks, 1, both, choices, link)
    return forward + backward + 2 * sum(both) / rates["memory"]


def _shown(
    blocks: Sequence[tuple[BlockTime, BlockTime]],
    direction: int,
    copied: Sequence[int],
    choices: Choices,
    link: float,
) -> float:
    """What is left of one direction's copies beside its computing."""
    copies = sum(copied) / link
    if not choices.use_stream:
        return copies
    # copies run one after the other, so a block that computes for longer than it copies hides the
    # copies of another
    return max(0.0, copies - sum(block[direction].seconds for block in blocks))


def _update_bytes(workload: Workload) -> int:
    """The gradients are read for their norm; then gradients, weights and state, and all but the
    gradients are written.
    """
    state = OPTIMIZERS[workload.optimizer].state_bytes(workload.adapter_itemsize)
    return round(workload.adapters * (4 * workload.adapter_itemsize + 2 * state))
