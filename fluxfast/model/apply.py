"""What may be chosen about how a model computes, and the setting of it on a model's blocks.

`fluxfast.memory.choices.choose` makes the choices; the trainer, the benchmark's models and
`accelerate` apply them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluxfast.checkpoint.side_by_side import pack_groups
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
        attention: a back end of `fluxfast.ops.attention`, or "auto".
        deterministic: the same bits each time that a step is computed.
        modulation_ahead: the weights of modulation and of the embedders stay in host memory, and
            the CPU computes modulation a step ahead.
        slots: groups of blocks that are on the device at a time; 0: all blocks are resident.
        blocks_per_group: blocks that are streamed together.
        use_stream: streamed blocks are copied beside the computation.
        host_inputs: the inputs of blocks wait in host memory for their backward.
        graphs: forward and backward are replayed as CUDA graphs.
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
    attention: str = "auto"
    deterministic: bool = False
    graphs: bool = False
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
        return (
            f"recomputation of blocks: {counts}; blocks {blocks}{inputs}; modulation {modulation}"
        )


def apply(blocks: Sequence[Any], choices: Choices) -> None:
    """Set on each block what it computes with and what it recomputes.

    The blocks are a `FluxTransformer`'s, or those of a host's model that `accelerate` has adopted.
    """
    policies = choices.recompute or ("none",) * len(blocks)
    for block, policy in zip(blocks, policies, strict=True):
        block.compute, block.outliers = choices.compute, choices.outliers
        block.attention = choices.attention
        block.policy, block.fixed_policy = policy, bool(choices.recompute)


def make_ready(transformer: FluxTransformer, choices: Choices) -> None:
    """Get a frozen transformer, on its device and with its adapters, ready to train.

    Modulation's weights go to where they are read, linears that read the same input come to lie
    side by side in memory, blocks get their choices, and the model is set to training. Streaming
    and CUDA graphs come after this.
    """
    transformer.set_modulation_ahead(choices.modulation_ahead)
    pack_groups(transformer)
    apply(transformer.blocks, choices)
    # the transformer tells each block its policy again when it runs
    transformer.set_recompute(choices.recompute)
    transformer.train()
