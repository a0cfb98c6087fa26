"""What the user says of the choices that `fluxfast.memory.choices.choose` makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fluxfast.config.precision_words import compute_named
from fluxfast.model.compiled import Compile
from fluxfast.quant import FORMATS

if TYPE_CHECKING:
    # pydantic, which `accelerate` does without
    from fluxfast.config.run import TrainConfig


@dataclass(frozen=True)
class Wishes:
    """What the user said of the choices.

    "auto" and None leave a choice to `choose`. Any other value is an order: it is followed, or
    refused with the reason, and never falls back.

    Attributes:
        compute: what products run in: "auto", "same", "int8" or "e4m3".
        eight_bit_bases: the formats of the base for which "auto" takes 8-bit products.
        outliers: channels of each product's input that stay out of 8 bits.
        impl: the kernels' implementation: "auto", "triton", "native" or "ref".
        recompute: a policy for all blocks, or one for each; None: as `checkpoint_every` says.
        checkpoint_every: one block of so many is checkpointed, 0: none; None: blocks do as the
            checkpointing around them asks.
        streams, blocks_per_group, use_stream: as in `Choices`, where no budget decides.
        vram_budget: GiB, or "auto" for all that is free but the reserve; None: no budget.
        vram_reserve: GiB that "auto" leaves free; None: as the kind of GPU wants it.
        modulation_ahead, cuda_graphs: True, False, or "auto".
        attention: a back end, or "auto".
        mechanism: a value of `attention_mechanism` (`config.attention`), where `attention` is
            "auto".
        compile, draws_compiled: how torch.compile is asked for, in training and while validation
            images are drawn; None: it is not.
        deterministic: the same bits each time that a step is computed.
        releases_gradients: weights are updated within backward.
    """

    compute: str = "auto"
    eight_bit_bases: tuple[str, ...] = tuple(FORMATS)
    outliers: int = 0
    impl: str = "auto"
    recompute: str | tuple[str, ...] | None = None
    checkpoint_every: int | None = None
    streams: bool = False
    blocks_per_group: int = 1
    use_stream: bool = False
    vram_budget: float | Literal["auto"] | None = None
    vram_reserve: float | None = None
    modulation_ahead: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    attention: str = "auto"
    mechanism: str = "diffusers"
    deterministic: bool = False
    compile: Compile | None = None
    draws_compiled: Compile | None = None
    releases_gradients: bool = False


def compile_of(config: TrainConfig) -> Compile:
    """What a run's config says of torch.compile, for training as for validation."""
    return Compile(
        backend="inductor" if config.dynamo_backend == "no" else config.dynamo_backend,
        mode=config.dynamo_mode,
        fullgraph=config.dynamo_fullgraph,
        dynamic=config.dynamo_dynamic,
        blocks=config.dynamo_use_regional_compilation,
    )


def wishes_of(config: TrainConfig) -> Wishes:
    """What a run's config says of the choices."""
    every = (config.gradient_checkpointing_interval or 1) if config.gradient_checkpointing else 0
    return Wishes(
        compute=compute_named(config.compute_precision),
        outliers=config.compute_outliers,
        recompute=config.recompute,
        checkpoint_every=every,
        streams=config.enable_group_offload,
        blocks_per_group=config.group_offload_blocks_per_group,
        use_stream=config.group_offload_use_stream,
        vram_budget=config.vram_budget,
        vram_reserve=config.vram_reserve,
        modulation_ahead=config.modulation_ahead,
        cuda_graphs=config.cuda_graphs,
        mechanism=config.attention_mechanism,
        deterministic=config.deterministic,
        compile=None if config.dynamo_backend == "no" else compile_of(config),
        draws_compiled=compile_of(config) if config.validation_torch_compile else None,
        releases_gradients=config.releases_gradients,
    )
