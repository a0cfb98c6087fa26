"""How much of a GPU's memory a block takes, measured.

A block of the same kind runs forward and backward in full size on meta tensors, and every byte that
is alive is counted (`live_bytes`). Nothing is computed and no kernel is launched, so this needs
neither a GPU nor Triton. It takes about 30 ms, and blocks that are alike are measured once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.adapters.kind import AdapterSettings
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.presets import is_target
from fluxfast.checkpoint.empty_model import linears, quantize_empty
from fluxfast.memory.live_bytes import LiveBytes
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.residency import Direction
from fluxfast.model.transformer import FluxTransformer, compute_dtype
from fluxfast.ops import verdicts
from fluxfast.ops.device import pretend
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import KEPT

# The GPU that tensors stand for: Hopper makes the most copies of weights, for 8-bit products.
ARCHITECTURE = "sm_90"
META = torch.device("meta")
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


class BlockMemory(NamedTuple):
    """Bytes that one block takes in one step.

    Attributes:
        input: the block's input.
        kept: what forward leaves for backward, the input included unless it is in host memory.
        forward: the most that is alive during forward, beside weights, the input, and what other
            blocks keep.
        backward: the most that is alive during backward, beside weights, the gradients of all
            adapters, and what this block and others keep. Of an input in host memory, this counts
            the copy on the device, and that of the block before, which is on its way by then.
    """

    input: int
    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class BlockWorkload:
    """What a workload says about one block: everything that its memory depends on.

    Attributes:
        sizes: those of a transformer that has this block alone.
        tokens: text and image tokens of a sample.
        adapted: the linears with an adapter, by their full names in that transformer.
        lora_type: the adapter's kind, a key of `fluxfast.adapters.kinds.KINDS`.
        trains_modulation: whether shifts, scales and gates need a gradient.
        input_on_host: whether the block's input is in host memory between forward and backward.
    """

    sizes: FluxSizes
    tokens: int
    text_tokens: int
    batch: int
    storage: Storage
    adapted: tuple[str, ...]
    lora_type: str
    rank: int
    adapter_itemsize: int
    compute: str
    recompute: str
    trains_modulation: bool
    input_on_host: bool

    @property
    def dtype(self) -> torch.dtype:
        """That of activations."""
        return compute_dtype(META, _DTYPES[self.storage.itemsize])


@lru_cache(maxsize=4096)
def block_memory(
    workload: Workload, index: int, recompute: str, input_on_host: bool = False
) -> BlockMemory:
    """The memory of the block `index` of a workload, where it recomputes as `recompute` says."""
    double = index < workload.sizes.num_layers
    sizes = replace(workload.sizes, num_layers=int(double), num_single_layers=int(not double))
    adapted = [
        linear for linear in sizes.block_linears(0) if is_target(linear.name, workload.targets)
    ]
    return measure(
        BlockWorkload(
            sizes=sizes,
            tokens=workload.tokens[index],
            text_tokens=workload.text_tokens,
            batch=workload.batch,
            storage=workload.storage,
            adapted=tuple(linear.name for linear in adapted if not linear.is_modulation),
            lora_type=workload.lora_type,
            rank=workload.rank,
            adapter_itemsize=workload.adapter_itemsize,
            compute=workload.compute,
            recompute=recompute,
            trains_modulation=workload.trained_modulation is not None,
            input_on_host=input_on_host,
        )
    )


@lru_cache(maxsize=1024)
def measure(block: BlockWorkload) -> BlockMemory:
    """The memory of a block, by running it."""
    model, modulation, tables = _transformer(block), _modulation(block), _rope_tables(block)
    start, live = torch.empty((), device=META, requires_grad=True), LiveBytes()
    live.ignore([*model.parameters(), *model.buffers(), *modulation, *tables, start])
    # A block that failed its check on this machine runs op by op, and then torch computes attention
    # on meta tensors as it never does on a GPU. So the check does not count here.
    with verdicts.ignored(), pretend(ARCHITECTURE, on_launch=None), torch.enable_grad(), live:
        streams = _BlocksBefore.apply(start, _stream_shapes(block), block.dtype)
        given = live.restart()
        # A single block's stream holds the text already.
        text = () if len(streams) == 2 else (None,)
        output = model.blocks[0](*streams, *text, modulation, tables)
        forward = live.peak - given
        loss = _BlocksBehind.apply(*(output if isinstance(output, tuple) else (output,)))
        del streams, output
        kept = live.restart()
        loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return BlockMemory(given, kept, forward, live.peak - kept - gradients)


def _transformer(block: BlockWorkload) -> FluxTransformer:
    """A transformer of this block alone, on meta, as a run has it at its first step."""
    dtype = _DTYPES[block.storage.itemsize]
    # PEFT would make its modules on the CPU, and draw random numbers for them.
    with META:
        # The block is given its tables, so the axes only have to add up to head_dim.
        axes = (block.sizes.attention_head_dim,)
        model = FluxTransformer(**vars(block.sizes), axes_dims_rope=axes)
        nn.Module.to(model, dtype).requires_grad_(False)
        if block.storage.format is not None:
            quantize_empty(model, FORMATS[block.storage.format], linears(model, KEPT), dtype)
        if block.adapted:
            dtype = _DTYPES[block.adapter_itemsize]
            settings = AdapterSettings(block.adapted, block.rank, float(block.rank), dtype=dtype)
            KINDS[block.lora_type].add(model, settings)
        make_ready(model, Choices((block.recompute,), compute=block.compute))
    (module,) = model.blocks
    if block.input_on_host:
        module.residency = _InputOnHost()
    return model


def _stream_shapes(block: BlockWorkload) -> list[tuple[int, int, int]]:
    """[B, S, D] of a double block's image and text, or of a single block's joint sequence."""
    image, text = block.tokens - block.text_tokens, block.text_tokens
    tokens = [image, text] if block.sizes.num_layers else [image + text]
    return [(block.batch, count, block.sizes.dim) for count in tokens]


def _modulation(block: BlockWorkload) -> tuple[Tensor, ...]:
    """The shifts, scales and gates [B, n · D] of each stream, which the plan counts apart."""
    count, vectors = (2, 6) if block.sizes.num_layers else (1, 3)
    shape = (block.batch, vectors * block.sizes.dim)
    options: dict[str, Any] = {"dtype": block.dtype, "device": META}
    return tuple(
        torch.empty(shape, **options, requires_grad=block.trains_modulation) for _ in range(count)
    )


def _rope_tables(block: BlockWorkload) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim / 2] in fp32, which all blocks share."""
    shape = (block.tokens, block.sizes.attention_head_dim // 2)
    return torch.empty(shape, device=META), torch.empty(shape, device=META)


class _InputOnHost:
    """A residency that has a block's input in host memory between forward and backward."""

    def __init__(self) -> None:
        self.ahead: list[Tensor] = []

    def use(self, direction: Direction) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        return x.shape, x.dtype

    def fetch(self, kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        shape, dtype = kept
        # `HostInputs` now starts to copy the input of the block before, which is as large.
        self.ahead.append(torch.empty(shape, dtype=dtype, device=META))
        return torch.empty(shape, dtype=dtype, device=META)


class _BlocksBefore(torch.autograd.Function):
    """Stands for the blocks before: makes a block's inputs, and drops their gradients."""

    @staticmethod
    def forward(
        ctx: Any, start: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        return tuple(start.new_empty(shape, dtype=dtype) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        return None, None, None


class _BlocksBehind(torch.autograd.Function):
    """Stands for the blocks behind: keeps nothing of a block's outputs, makes their gradients."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.like)
