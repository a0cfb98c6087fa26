"""How much memory a step takes, part by part, and which choices make it fit: without a device.

What the user fixed is a `Workload`; what may be chosen is `Choices`. `account` adds up the bytes of
both, `predict` the seconds, and `fit` finds the fastest choices within a budget. A step's peak is
at some block, most often in its backward: there is what the blocks before it keep, the gradients of
the blocks after it, and the block's own working set. What a block keeps and works with is measured
(`block_memory`); everything else follows from sizes. `fluxfast-bench vram` compares the sums with a
full-size step and allows them to be 1.5 % off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.memory.block_memory import BlockMemory, block_memory, room_for_adapters
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.sizes import Workload
from fluxfast.memory.step_time import StepTime, step_seconds
from fluxfast.memory.stream import DEFAULT_SLOTS
from fluxfast.model.apply import Choices
from fluxfast.ops import verdicts
from fluxfast_kernels.launch import reads_transposed

GIB = 2**30
# the driver's context and the kernels that are loaded into it: not the allocator's, but the GPU's
CUDA_CONTEXT = GIB // 2
# what the allocator holds beyond what is in use, of its peak
FRAGMENTATION = 0.03
# cuBLAS's, from the caching allocator, for each stream that computes (Hopper's size, which is the
# largest)
GEMM_WORKSPACE = 32 * 2**20
# Python with PyTorch and its CUDA libraries
PROCESS = 2 * GIB
# what loading holds beside the model (the bound that it keeps)
LOADING = 3 * 10**9


@dataclass(frozen=True)
class Plan:
    """Bytes that a step takes at its peak.

    vram: by part; they add up to the peak. host: host memory by part.
    """

    vram: dict[str, int]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that the allocator has handed out, so without the CUDA context."""
        return sum(self.vram.values()) - self.vram["CUDA context"]

    @property
    def needed(self) -> int:
        """What the GPU must have free."""
        return round(self.peak * (1 + FRAGMENTATION)) + self.vram["CUDA context"]


def account(workload: Workload, choices: Choices) -> Plan:
    """What a step takes with these choices."""
    blocks = _block_weights(workload, choices)
    modulation = workload.outer_modulation_weights
    if not _modulation_streams(choices):
        modulation += sum(workload.modulation_weights)
    step = choices.blocks_per_group
    groups = [sum(blocks[i : i + step]) for i in range(0, len(blocks), step)]
    memory = [
        block_memory(workload, index, policy, choices.host_inputs, choices.transposed_codes)
        for index, policy in enumerate(choices.recompute)
    ]
    saved, working = _at_peak(memory)
    # a block's are all there before the first of them is let go
    elements = workload.adapters_of_a_block if workload.releases_gradients else workload.adapters
    gradients = elements * workload.adapter_itemsize
    # of a micro-batch, and where there are several, their sum (`model.flat_gradients`)
    summed = gradients if workload.micro_batches > 1 else 0
    state = OPTIMIZERS[workload.optimizer].state_bytes(workload.adapter_itemsize)
    # autograd makes each gradient before it comes to its place in the buffer
    gradients *= 2 if workload.trains_all else 1
    average = workload.adapters * 4
    adapters = 0 if workload.trains_all else workload.adapters * workload.adapter_itemsize
    resident = 0 if choices.streams else sum(blocks) + _room(workload)
    vram = {
        "weights": workload.outer_weights + resident,
        "transposed codes": workload.product_codes if choices.transposed_codes else 0,
        "modulation": workload.modulation_vectors if choices.modulation_ahead else modulation,
        "adapters": adapters + workload.assistant,
        "gradients": gradients + summed,
        "optimiser": round(workload.adapters * state),
        "moving average": average if workload.average == "device" else 0,
        "saved activations": saved,
        "working set": working + _beside_blocks(workload) + GEMM_WORKSPACE,
        # it encodes on the stream that the steps run on, so at any moment of one
        "VAE": workload.vae,
        "ring": choices.slots * max(groups) if choices.streams else 0,
        "CUDA context": CUDA_CONTEXT,
    }
    host = {
        "process": PROCESS,
        "streamed blocks": sum(blocks) if choices.streams else 0,
        "modulation": modulation if choices.modulation_ahead else 0,
        "moving average": average if workload.average == "host" else 0,
        "blocks' inputs": sum(block.input for block in memory) if choices.host_inputs else 0,
    }
    return Plan(vram, host)


def _modulation_streams(choices: Choices) -> bool:
    """Whether modulation's weights stream with their blocks, and have no place of their own."""
    return choices.streams and not choices.modulation_ahead


def _block_weights(workload: Workload, choices: Choices) -> list[int]:
    """Bytes of the weights that lie in each block's place, or stream with it."""
    if not _modulation_streams(choices):
        return workload.block_weights
    pairs = zip(workload.block_weights, workload.modulation_weights, strict=True)
    return [of_block + of_modulation for of_block, of_modulation in pairs]


def _room(workload: Workload) -> int:
    """Bytes that resident weights of all blocks leave free for adapters."""
    return sum(room_for_adapters(workload, index) for index in range(workload.sizes.blocks))


def loading_bytes(workload: Workload) -> int:
    """Host memory that loading and quantising take at most."""
    return workload.frozen_bytes + LOADING


def _beside_blocks(workload: Workload) -> int:
    """The batch, which is latents, text embeddings and the target in fp32, and RoPE's fp32 tables
    of cos and sin.
    """
    sizes, tokens = workload.sizes, max(workload.tokens)
    latents = (tokens - workload.text_tokens) * sizes.in_channels
    text = workload.text_tokens * sizes.joint_attention_dim
    batch = workload.batch * (2 * (latents + text) + 4 * latents)
    return batch + 4 * tokens * sizes.attention_head_dim


def _at_peak(blocks: Sequence[BlockMemory]) -> tuple[int, int]:
    """(saved activations, working set) of the moment at which they are the most, together."""
    moments, saved = [], 0
    for block in blocks:
        moments.append((saved + block.input, block.forward))
        saved += block.kept
        moments.append((saved, block.backward))
    return max(moments, key=sum)


def predict(workload: Workload, choices: Choices, gpu: Gpu) -> StepTime:
    """The time of one step."""
    streamed = _block_weights(workload, choices) if choices.streams else ()
    return step_seconds(workload, choices, gpu, streamed=streamed)


def fit(
    workload: Workload, gpu: Gpu, budget: int, *, modulation_ahead: bool = True
) -> Choices | None:
    """The choices with the shortest predicted step that need at most `budget` bytes of VRAM.

    None where no choices fit. Of equally fast ones, those that need less are taken.
    """
    best: tuple[float, int] | None = None
    chosen = None
    for choices in candidates(workload, gpu, modulation_ahead=modulation_ahead):
        needed = account(workload, choices).needed
        if needed <= budget:
            rank = (round(predict(workload, choices, gpu).total, 6), needed)
            if best is None or rank < best:
                best, chosen = rank, choices
    return chosen


def why_nothing_fits(workload: Workload, budget: int, *, modulation_ahead: bool) -> list[str]:
    """What a step takes at the very least, and which settings would lower that; a line each."""
    least = Choices(
        ("full",) * workload.sizes.blocks,
        slots=DEFAULT_SLOTS,
        host_inputs=True,
        modulation_ahead=modulation_ahead,
    )
    needed = account(workload, least).needed
    lines = [
        f"a step takes {needed / GIB:.2f} GiB at the least (blocks streamed, recomputed), there "
        f"are {budget / GIB:.2f}"
    ]
    smaller = {
        "a smaller train_batch_size": replace(workload, batch=1),
        "int8-quanto as base_model_precision": _stored(workload, "int8"),
        "int4-quanto as base_model_precision": _stored(workload, "int4"),
        "half the tokens (a lower resolution)": replace(
            workload, tokens=tuple(tokens // 2 for tokens in workload.tokens)
        ),
        "lora_rank 4": replace(workload, rank=min(workload.rank, 4)),
    }
    for name, other in smaller.items():
        if (size := account(other, least).needed) < needed:
            lines.append(f"with {name} it takes {size / GIB:.2f} GiB")
    if (verdict := verdicts.failed(verdicts.STREAMING, verdicts.ONLY_WAY)) is not None:
        lines.append(f"blocks are not streamed: {verdict}")
    return lines


def _stored(workload: Workload, format: str) -> Workload:
    return replace(workload, storage=replace(workload.storage, format=format))


def takes_transposed(workload: Workload, gpu: Gpu) -> bool:
    """Whether there is anything to gain from a transposed copy of the base's codes."""
    return workload.product_codes > 0 and reads_transposed(gpu.arch)


def candidates(workload: Workload, gpu: Gpu, *, modulation_ahead: bool = True) -> Iterator[Choices]:
    """Every combination worth looking at.

    Streaming is left out where it failed its check on this machine (`ops.verdicts`). Streamed
    blocks have no transposed codes, which would double what is copied.
    """
    orders = (True, False) if takes_transposed(workload, gpu) else (False,)
    rings = (0, 4, 3, 2) if verdicts.failed(verdicts.STREAMING, verdicts.ONLY_WAY) is None else (0,)
    for slots in rings:
        # inputs go to host memory and back beside the computation, as streamed blocks do
        ways = product((False, True) if slots else (False,), (False,) if slots else orders)
        for host_inputs, transposed_codes in ways:
            for recompute in policies(workload.sizes.blocks):
                yield Choices(
                    recompute,
                    slots=slots,
                    use_stream=slots > 0,
                    host_inputs=host_inputs,
                    modulation_ahead=modulation_ahead,
                    transposed_codes=transposed_codes,
                )


def policies(blocks: int) -> Iterator[tuple[str, ...]]:
    """Policies for all blocks, from the most memory to the least.

    The last blocks recompute least, since backward frees what they keep first.
    """
    for lean, rich in (("selective", "none"), ("full", "selective")):
        for rich_blocks in range(blocks, 0, -1):
            yield (lean,) * (blocks - rich_blocks) + (rich,) * rich_blocks
    yield ("full",) * blocks
