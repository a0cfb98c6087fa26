"""How much memory a run takes, part by part, and which choices make it fit, without weights or a
device.

What the user fixed is a `Workload`; what is ours to choose is `Choices`. `account` adds up; `fit`
chooses. A step's peak is at some block, most often in its backward: there is what the blocks before
it keep, the gradients of those after it, and what it works with. What a block keeps and works with
is measured (`block_memory`); everything else follows from sizes. `fluxfast-bench vram` holds the
sums to a whole step's, within 1.5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.memory.block_memory import BlockMemory, block_memory
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.sizes import Workload
from fluxfast.memory.step_time import BlockWork, StepTime, step_seconds
from fluxfast.ops import verdicts

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
class Choices:
    """What is ours to choose. recompute: a policy for each block. slots: of the ring that blocks
    stream through, 0: resident.

    modulation_ahead: its weights, and the embedders', stay in host memory. host_inputs: blocks'
    inputs wait there for backward.
    """

    recompute: tuple[str, ...]
    slots: int = 0
    blocks_per_group: int = 1
    modulation_ahead: bool = False
    host_inputs: bool = False

    @property
    def streams(self) -> bool:
        return self.slots > 0


@dataclass(frozen=True)
class Plan:
    """Bytes by part, at the step's peak: of VRAM, which add up to it; of host memory; and of each
    block's copies.
    """

    vram: dict[str, int]
    host: dict[str, int]
    streamed: tuple[int, ...] = field(default=())

    @property
    def peak(self) -> int:
        """What the allocator has handed out at most: without the CUDA context."""
        return sum(self.vram.values()) - self.vram["CUDA context"]

    @property
    def needed(self) -> int:
        """What the GPU must have free."""
        return round(self.peak * (1 + FRAGMENTATION)) + self.vram["CUDA context"]


def account(workload: Workload, choices: Choices) -> Plan:
    """What a step takes with these choices."""
    sizes = workload.sizes
    # modulation has a place of its own, unless it streams with the blocks
    apart = choices.modulation_ahead or not choices.streams
    blocks = [
        of_block + (0 if apart else of_modulation)
        for of_block, of_modulation in zip(
            workload.block_weights, workload.modulation_weights, strict=True
        )
    ]
    modulation = workload.outer_modulation_weights + (
        sum(workload.modulation_weights) if apart else 0
    )
    step = choices.blocks_per_group
    groups = [sum(blocks[i : i + step]) for i in range(0, sizes.blocks, step)]
    memory = [
        block_memory(workload, index, policy, choices.host_inputs)
        for index, policy in enumerate(choices.recompute)
    ]
    saved, gradients, working = _at_peak(workload, memory)
    state = OPTIMIZERS[workload.optimizer].state_bytes(workload.adapter_itemsize)
    vram = {
        "weights": workload.outer_weights + (0 if choices.streams else sum(blocks)),
        "modulation": workload.modulation_vectors if choices.modulation_ahead else modulation,
        "adapters": workload.adapters * workload.adapter_itemsize,
        "gradients": gradients,
        "optimiser": round(workload.adapters * state),
        "saved activations": saved,
        "working set": working + _beside_blocks(workload) + GEMM_WORKSPACE,
        "ring": choices.slots * max(groups) if choices.streams else 0,
        "CUDA context": CUDA_CONTEXT,
    }
    host = {
        "process": PROCESS,
        "streamed blocks": sum(blocks) if choices.streams else 0,
        "modulation": modulation if choices.modulation_ahead else 0,
        "blocks' inputs": sum(block.input for block in memory) if choices.host_inputs else 0,
    }
    return Plan(vram, host, tuple(blocks) if choices.streams else ())


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


def _at_peak(workload: Workload, blocks: Sequence[BlockMemory]) -> tuple[int, int, int]:
    """(saved activations, gradients, working set) of the moment at which they are the most,
    together.
    """
    own = [elements * workload.adapter_itemsize for elements in workload.block_adapters]
    moments, saved = [], 0
    # backward has come to the first block last, when the gradients of all adapters are there
    gradients = workload.adapters * workload.adapter_itemsize
    for block, adapters in zip(blocks, own, strict=True):
        moments.append((saved + block.input, 0, block.forward))
        saved += block.kept
        moments.append((saved, gradients, block.backward))
        gradients -= adapters
    return max(moments, key=sum)


def predict(workload: Workload, choices: Choices, gpu: Gpu) -> StepTime:
    """The time of one forward and backward pass."""
    works = [
        BlockWork(tokens, index < workload.sizes.num_layers, policy)
        for index, (tokens, policy) in enumerate(
            zip(workload.tokens, choices.recompute, strict=True)
        )
    ]
    return step_seconds(
        works,
        workload.sizes,
        gpu,
        batch=workload.batch,
        rank=workload.rank,
        compute=workload.compute,
        streamed=account(workload, choices).streamed,
        modulation=0 if choices.modulation_ahead else sum(workload.modulation_weights),
    )


def fit(workload: Workload, gpu: Gpu, budget: int) -> Choices | None:
    """The choices with the shortest predicted step that need at most `budget` bytes of VRAM; None
    where none are enough.
    """
    best: tuple[float, int] | None = None
    chosen = None
    for choices in candidates(workload):
        needed = account(workload, choices).needed
        if needed <= budget:
            # of equally fast ones the one that leaves more free
            rank = (round(predict(workload, choices, gpu).total, 6), needed)
            if best is None or rank < best:
                best, chosen = rank, choices
    return chosen


def candidates(workload: Workload) -> Iterator[Choices]:
    """Every combination worth looking at; blocks are not streamed where that failed its check
    (`ops.verdicts`).
    """
    ahead = not workload.trains_modulation
    rings = (0, 4, 3, 2) if verdicts.failed(verdicts.STREAMING, verdicts.ONLY_WAY) is None else (0,)
    residencies = [Choices((), slots, modulation_ahead=ahead) for slots in rings]
    residencies += [
        replace(residency, host_inputs=True) for residency in residencies if residency.streams
    ]
    for residency in residencies:
        for recompute in policies(workload.sizes.blocks):
            yield replace(residency, recompute=recompute)


def policies(blocks: int) -> Iterator[tuple[str, ...]]:
    """Policies from "none" to "full", block by block; the last blocks keep most, as backward frees
    them first.
    """
    for lean, rich in (("selective", "none"), ("full", "selective")):
        for rich_blocks in range(blocks, 0, -1):
            yield (lean,) * (blocks - rich_blocks) + (rich,) * rich_blocks
    yield ("full",) * blocks
