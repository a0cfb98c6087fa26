"""What may be chosen about how a model computes, and the setting of it on a model's blocks.

`fluxfast.memory.choices.choose` makes the choices; the trainer, the benchmark's models and
`accelerate` apply them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.model.compiled import Compile, CompiledRegions
from fluxfast.model.launch_plans import LaunchPlans
from fluxfast.model.room import make_room_for_adapters
from fluxfast.model.stored_codes import keep_transposed
from fluxfast.model.transformer import FluxTransformer


@dataclass(frozen=True)
class Choices:
    """How a model computes a step: everything that fluxfast chooses where the user does not.

    Attributes:
        recompute: a policy for each block, "none", "selective" or "full"; empty: as gradient
            checkpointing around the blocks asks.
        compute: what the blocks' wide products run in: "same" (the activations' dtype), "int8" or
            "e4m3".
        outliers: channels of each product's input, the largest, that stay out of 8 bits.
        transposed_codes: the codes that the base is stored as have a transposed copy on the device,
            which dgrad reads.
        attention: a back end of `fluxfast.ops.attention`, or "auto".
        deterministic: the same bits each time that a step is computed.
        modulation_ahead: the weights of modulation and of the embedders stay in host memory, and
            the CPU computes modulation a step ahead.
        slots: groups of blocks that are on the device at a time; 0: all blocks are resident.
        blocks_per_group: blocks that are streamed together.
        use_stream: streamed blocks are copied beside the computation.
        host_inputs: the inputs of blocks wait in host memory for their backward.
        graphs: forward and backward are replayed as CUDA graphs.
        compile: how torch.compile is asked for; None: it is not.
        reasons: a line for each choice, by its name.
    """

    recompute: tuple[str, ...]
    slots: int = 0
    blocks_per_group: int = 1
    use_stream: bool = False
    host_inputs: bool = False
    modulation_ahead: bool = False
    compute: str = "same"
    outliers: int = 0
    transposed_codes: bool = False
    attention: str = "auto"
    deterministic: bool = False
    graphs: bool = False
    compile: Compile | None = None
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def streams(self) -> bool:
        return self.slots > 0

    def summary(self) -> str:
        """What is recomputed and where the weights are, in one line."""
        counts = ", ".join(
            f"{policy} in {self.recompute.count(policy)}"
            for policy in ("none", "selective", "full")
            if policy in self.recompute
        )
        blocks = f"streamed through a ring of {self.slots}" if self.streams else "resident"
        inputs = ", their inputs in host memory" if self.host_inputs else ""
        modulation = "ahead, in host memory" if self.modulation_ahead else "on the GPU"
        codes = "; codes in both orders" if self.transposed_codes else ""
        return (
            f"recomputation of blocks: {counts}; blocks {blocks}{inputs}; modulation {modulation}"
            f"{codes}"
        )


def apply(blocks: Sequence[Any], choices: Choices) -> None:
    """Set on each block what it computes with and what it recomputes.

    The blocks are a `FluxTransformer`'s, or those of a host's model that `accelerate` has adopted.
    """
    policies, plans = choices.recompute or ("none",) * len(blocks), LaunchPlans()
    for block, policy in zip(blocks, policies, strict=True):
        block.compute, block.outliers = choices.compute, choices.outliers
        block.attention, block.launch_plans = choices.attention, plans
        block.policy, block.fixed_policy = policy, bool(choices.recompute)


@contextmanager
def drawing_with(
    transformer: FluxTransformer, attention: str | None, compiled: CompiledRegions | None
) -> Iterator[None]:
    """Inside, a transformer draws images with this in place of what it trains with.

    attention: a back end; None: the one of training. compiled: what compiles; None: nothing does.
    """
    before = transformer.compiled, [block.attention for block in transformer.blocks]
    transformer.compiled = compiled
    if attention is not None:
        transformer.set_attention(attention)
    try:
        yield
    finally:
        transformer.compiled = before[0]
        for block, backend in zip(transformer.blocks, before[1], strict=True):
            block.attention = backend


def make_ready(transformer: FluxTransformer, choices: Choices) -> None:
    """Get a frozen transformer, on its device and with its adapters, ready to train.

    Modulation's weights go to where they are read, linears that read the same input come to lie
    side by side in memory, with room for their adapters where products use that, blocks get their
    choices, codes their transposed copies where those are chosen, torch.compile what it should, and
    the model is set to training.
    Streaming and CUDA graphs come after this. Weights that will be streamed get no room: they are
    copied as one run of bytes, without gaps.
    """
    transformer.set_modulation_ahead(choices.modulation_ahead)
    pack_groups(transformer)
    apply(transformer.blocks, choices)
    if not choices.streams:
        make_room_for_adapters(transformer.blocks)
    groups = [group for block in transformer.blocks for group in block.linear_groups()]
    keep_transposed(groups, choices.compute if choices.transposed_codes else None)
    # the transformer tells each block its policy again when it runs
    transformer.set_recompute(choices.recompute)
    transformer.set_compile(choices.compile)
    transformer.train()
