"""How much of a GPU's memory a block takes, measured.

A block of the same kind runs forward and backward in full size on meta tensors, as between others
of its kind, and every byte that is alive is counted (`live_bytes`). Nothing is computed and no
kernel is launched, so this needs neither a GPU nor Triton. It takes about 100 ms, and blocks that
are alike are measured once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.adapters.kind import AdapterSettings, Size
from fluxfast.adapters.kinds import KINDS
from fluxfast.checkpoint.empty_model import linears, quantize_empty
from fluxfast.memory.live_bytes import LiveBytes
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.residency import Direction
from fluxfast.model.stored_codes import transposed_copies
from fluxfast.model.streams import streams_of, whole_of
from fluxfast.model.transformer import FluxTransformer, compute_dtype
from fluxfast.ops import verdicts
from fluxfast.ops.device import OnLaunch, pretend
from fluxfast.ops.parts import Parts
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
            the copy on the device, and that of the block before, if there is one, which is on its
            way by then.
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
        adapted: the linears with an adapter, by their full names in that transformer, and the
            size of each.
        lora_type: the adapter's kind, a key of `fluxfast.adapters.kinds.KINDS`.
        trains_modulation: whether shifts, scales and gates need a gradient.
        input_on_host: whether the block's input is in host memory between forward and backward.
        first: whether it is the first block of those, so that no other input follows its own.
        transposed_codes: whether its codes have a transposed copy, which is not counted here.
    """

    sizes: FluxSizes
    tokens: int
    text_tokens: int
    batch: int
    storage: Storage
    adapted: tuple[tuple[str, Size], ...]
    lora_type: str
    rank: int
    adapter_itemsize: int
    compute: str
    recompute: str
    trains_modulation: bool
    input_on_host: bool
    first: bool
    transposed_codes: bool

    @property
    def dtype(self) -> torch.dtype:
        """That of activations."""
        return compute_dtype(META, _DTYPES[self.storage.itemsize])


@lru_cache(maxsize=4096)
def block_memory(
    workload: Workload,
    index: int,
    recompute: str,
    input_on_host: bool = False,
    transposed_codes: bool = False,
) -> BlockMemory:
    """The memory of the block `index` of a workload, where it recomputes as `recompute` says."""
    return measure(block_workload(workload, index, recompute, input_on_host, transposed_codes))


@lru_cache(maxsize=4096)
def room_for_adapters(workload: Workload, index: int) -> int:
    """Bytes that resident weights of the block `index` leave free for adapters (`model.room`)."""
    return _room(block_workload(workload, index, "full"))


@lru_cache(maxsize=1024)
def _room(block: BlockWorkload) -> int:
    frozen = [p for p in _transformer(block).parameters() if not p.requires_grad]
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in frozen}
    return sum(storages.values()) - sum(p.nbytes for p in frozen)


def block_workload(
    workload: Workload,
    index: int,
    recompute: str,
    input_on_host: bool = False,
    transposed_codes: bool = False,
) -> BlockWorkload:
    """What a workload says about its block `index`."""
    double = index < workload.sizes.num_layers
    sizes = replace(workload.sizes, num_layers=int(double), num_single_layers=int(not double))
    of_block = zip(sizes.block_linears(0), workload.sizes.block_linears(index), strict=True)
    adapted = [
        (alone.name, size)
        for alone, linear in of_block
        if not linear.is_modulation and (size := workload.size_on(linear.name)) is not None
    ]
    return BlockWorkload(
        sizes=sizes,
        tokens=workload.tokens[index],
        text_tokens=workload.text_tokens,
        batch=workload.batch,
        storage=workload.storage,
        adapted=tuple(adapted),
        lora_type=workload.lora_type,
        rank=workload.rank,
        adapter_itemsize=workload.adapter_itemsize,
        compute=workload.compute,
        recompute=recompute,
        trains_modulation=workload.trained_modulation is not None,
        input_on_host=input_on_host,
        first=input_on_host and index == 0,
        transposed_codes=transposed_codes,
    )


@lru_cache(maxsize=1024)
def measure(block: BlockWorkload) -> BlockMemory:
    """The memory of a block, by running it."""
    ran, live = MetaBlock(block), LiveBytes()
    live.ignore(ran.tensors)
    with ran.on_gpu(ARCHITECTURE, on_launch=None):
        ran.warm_up()
        with live:
            streams = ran.streams()
            given = live.restart()
            output = ran(streams)
            forward = live.peak - given
            loss = ran.loss(output)
            del streams, output
            kept = live.restart()
            loss.backward()
    return BlockMemory(given, kept, forward, live.peak - kept - ran.gradients)


class MetaBlock:
    """A block on meta tensors with all that it reads, to be run forward and backward."""

    def __init__(self, block: BlockWorkload) -> None:
        self._block, self._model = block, _transformer(block)
        self._modulation, self._tables = _modulation(block), _rope_tables(block)
        self._start = torch.empty((), device=META, requires_grad=True)
        # whether the blocks beside this one have both streams in one tensor
        self._in_one_tensor = False

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is there before the block runs: weights, modulation, RoPE's tables."""
        weights = [*self._model.parameters(), *self._model.buffers()]
        groups = self._model.blocks[0].linear_groups()
        weights += transposed_copies(groups, self._block.compute)
        return [*weights, *self._modulation, *self._tables, self._start]

    @property
    def gradients(self) -> int:
        """Bytes of the parameters' gradients."""
        return sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None)

    def warm_up(self) -> None:
        """A first step, whose launches make tables and semaphores that all later ones share.

        It also tells how a block such as this one hands its streams to the next.
        """
        output = self(self.streams())
        self._in_one_tensor = isinstance(output, tuple) and whole_of(*output) is not None
        self.loss(output).backward()
        for trained in (*self._model.parameters(), *self._modulation):
            trained.grad = None

    @contextmanager
    def on_gpu(self, arch: str, on_launch: OnLaunch | None) -> Iterator[None]:
        """Inside, the block runs as on a GPU of that architecture (`ops.device.pretend`)."""
        # A block that failed its check on this machine runs op by op, and then torch computes
        # attention on meta tensors as it never does on a GPU. So the check does not count here.
        with verdicts.ignored(), pretend(arch, on_launch), torch.enable_grad():
            yield

    def streams(self) -> tuple[Tensor, ...]:
        """The block's inputs: image and text of a double block, a single block's joint stream."""
        batch, width = self._block.batch, self._block.sizes.dim
        image, text = self._block.tokens - self._block.text_tokens, self._block.text_tokens
        if self._in_one_tensor:
            rows = (batch * (text + image), width)
            (flat,) = _BlocksBefore.apply(self._start, [rows], self._block.dtype)
            txt, img = streams_of(flat, Parts(batch * text, batch))
            return img, txt
        tokens = [image, text] if self._block.sizes.num_layers else [image + text]
        shapes = [(batch, count, width) for count in tokens]
        return _BlocksBefore.apply(self._start, shapes, self._block.dtype)

    def __call__(self, streams: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        # A single block's stream holds the text already.
        text = () if len(streams) == 2 else (None,)
        return self._model.blocks[0](*streams, *text, self._modulation, self._tables)

    def loss(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        """A number whose backward begins with the gradients of the block's outputs."""
        outputs = output if isinstance(output, tuple) else (output,)
        whole = whole_of(*outputs) if self._in_one_tensor else None
        return _BlocksBehind.apply(*(outputs if whole is None else (whole,)))


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
            settings = AdapterSettings(
                "all", block.rank, float(block.rank), dtype=dtype, by_module=dict(block.adapted)
            )
            KINDS[block.lora_type].add(model, settings)
        choices = Choices(
            (block.recompute,), compute=block.compute, transposed_codes=block.transposed_codes
        )
        with pretend(ARCHITECTURE, on_launch=None):
            make_ready(model, choices)
    (module,) = model.blocks
    if block.input_on_host:
        module.residency = _InputOnHost(block.first)
    return model


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

    def __init__(self, first: bool) -> None:
        self._first = first
        self.ahead: list[Tensor] = []

    def use(self, direction: Direction) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        return x.shape, x.dtype

    def fetch(self, kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        shape, dtype = kept
        if not self._first:
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
