"""What a FLUX.1 transformer is made of, and the bytes of each part, from its config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fluxfast.adapters.kind import Size
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.presets import is_target
from fluxfast.config.adapters import FULL
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import KEPT

# FLUX.1's VAE: its parameters, and what its encoder holds at its peak for each pixel of an image
VAE_PARAMETERS, VAE_ELEMENTS_PER_PIXEL = 83_819_683, 640


class Linear(NamedTuple):
    """One of the model's linears, by its full name."""

    name: str
    out_features: int
    in_features: int

    @property
    def is_modulation(self) -> bool:
        """Whether it makes shifts, scales and gates, or the vector that they are made from."""
        return self.name.endswith(
            ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
        ) or (self.name.startswith("time_text_embed."))


@dataclass(frozen=True)
class FluxSizes:
    """The numbers of a FLUX.1 transformer's config that sizes follow from.

    The defaults are FLUX.1-dev's.
    """

    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxSizes:
        """From a transformer's `config.json`."""
        return cls(
            **{field.name: config[field.name] for field in fields(cls) if field.name in config}
        )

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    def block_linears(self, index: int) -> list[Linear]:
        """The linears of a block. index: counts both kinds, the double blocks first."""
        d, mlp = self.dim, 4 * self.dim
        if index < self.num_layers:
            shapes = {
                "norm1.linear": (6 * d, d),
                "norm1_context.linear": (6 * d, d),
                **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")},
                **{
                    f"attn.{name}": (d, d)
                    for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
                },
                **{f"{ff}.net.0.proj": (mlp, d) for ff in ("ff", "ff_context")},
                **{f"{ff}.net.2": (d, mlp) for ff in ("ff", "ff_context")},
            }
            prefix = f"transformer_blocks.{index}"
        else:
            shapes = {
                "norm.linear": (3 * d, d),
                **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")},
                "proj_mlp": (mlp, d),
                "proj_out": (d, d + mlp),
            }
            prefix = f"single_transformer_blocks.{index - self.num_layers}"
        return [Linear(f"{prefix}.{name}", *shape) for name, shape in shapes.items()]

    def outer_linears(self) -> list[Linear]:
        """The linears that belong to no block."""
        d = self.dim
        embedders = {"timestep_embedder": 256, "text_embedder": self.pooled_projection_dim}
        if self.guidance_embeds:
            embedders["guidance_embedder"] = 256
        found = [
            Linear("x_embedder", d, self.in_channels),
            Linear("context_embedder", d, self.joint_attention_dim),
        ]
        for name, width in embedders.items():
            found += [
                Linear(f"time_text_embed.{name}.linear_1", d, width),
                Linear(f"time_text_embed.{name}.linear_2", d, d),
            ]
        return [
            *found,
            Linear("norm_out.linear", 2 * d, d),
            Linear("proj_out", self.in_channels, d),
        ]

    def linears(self) -> Iterator[Linear]:
        for index in range(self.blocks):
            yield from self.block_linears(index)
        yield from self.outer_linears()

    def norms(self, index: int) -> int:
        """How many weights a block's RMS norms have."""
        return self.attention_head_dim * (4 if index < self.num_layers else 2)


@dataclass(frozen=True)
class Storage:
    """How the frozen weights are stored.

    format: a format's name, or None. itemsize: bytes an element of what is in no format.
    """

    format: str | None
    itemsize: int = 2

    def weight(self, linear: Linear) -> int:
        """Bytes of a linear's weight, with whatever scales it."""
        shape = (linear.out_features, linear.in_features)
        if self.format is None or linear.name in KEPT:
            return math.prod(shape) * self.itemsize
        return sum(
            math.prod(size) * dtype.itemsize
            for size, dtype in FORMATS[self.format].layout(shape).values()
        )

    def linear(self, linear: Linear) -> int:
        """Bytes of a linear's weight and bias."""
        return self.weight(linear) + linear.out_features * self.itemsize


def vae_bytes(pixels: int, *, itemsize: int) -> int:
    """What FLUX.1's VAE takes while it encodes one image of so many pixels; 0 pixels: no VAE.

    itemsize: bytes of the type that it computes in. Counted on tensors without data, with attention
    that keeps no scores; what cuDNN works with is not in it.
    """
    return pixels and itemsize * (VAE_PARAMETERS + pixels * VAE_ELEMENTS_PER_PIXEL)


# compared by identity, which makes it a quick key of caches
@dataclass(frozen=True, eq=False)
class Workload:
    """What a step computes; what is chosen about how is in `Choices`, but for `compute`.

    Attributes:
        sizes: the transformer's.
        tokens: how many each block sees of a sample, text and image together.
        text_tokens: how many of them are text.
        batch: samples.
        storage: how the frozen weights are stored.
        targets: the modules that adapters sit on, by PEFT's rule.
        rank: the adapters'.
        by_module: the modules that adapters sit on by their whole names, and the size of each, in
            the place of targets and rank; in a kind that has them from elsewhere.
        adapter_itemsize: bytes of an adapter's element.
        optimizer: its name.
        compute: what products run in, as in `Choices`.
        micro_batches: how many a step adds up.
        vae: bytes of a VAE that encodes images beside the steps (`vae_bytes`); 0: there is none.
        assistant: bytes of a frozen adapter beside the one that trains; 0: there is none.
        releases_gradients: whether a gradient is freed once its block's backward is done.
        average: where a moving average of the adapter is, in fp32: "device" or "host"; None: there
            is none.
    """

    sizes: FluxSizes
    tokens: tuple[int, ...]
    text_tokens: int
    batch: int
    storage: Storage
    targets: tuple[str, ...]
    rank: int
    adapter_itemsize: int = 2
    optimizer: str = "adamw_bf16"
    compute: str = "same"
    lora_type: str = "standard"
    micro_batches: int = 1
    by_module: Mapping[str, Size] | None = None
    vae: int = 0
    assistant: int = 0
    average: Literal["device", "host"] | None = None
    releases_gradients: bool = False

    @property
    def trains_all(self) -> bool:
        """Whether the weights themselves train, so that none are frozen."""
        return self.lora_type == FULL

    def size_on(self, name: str) -> Size | None:
        """The size of the adapter on a linear, by the linear's full name; None: it has none."""
        if self.trains_all:
            return 0
        if self.by_module is not None:
            return self.by_module.get(name)
        return self.rank if is_target(name, self.targets) else None

    @cached_property
    def trained_modulation(self) -> str | None:
        """The first of modulation's linears that an adapter sits on, by its full name."""
        return next(
            (
                linear.name
                for linear in self.sizes.linears()
                if linear.is_modulation and self.size_on(linear.name) is not None
            ),
            None,
        )

    @cached_property
    def block_weights(self) -> list[int]:
        """Bytes of each block's frozen tensors, without modulation."""
        return [
            sum(
                self.storage.linear(linear)
                for linear in self.sizes.block_linears(index)
                if not linear.is_modulation
            )
            + self.sizes.norms(index) * self.storage.itemsize
            for index in range(self.sizes.blocks)
        ]

    @cached_property
    def product_codes(self) -> int:
        """Bytes of the blocks' weights that are stored as the codes that products read; 0: none.

        A transposed copy of them takes as much again.
        """
        if self.storage.format is None:
            return 0
        if FORMATS[self.storage.format].stored_codes != self.compute:
            return 0
        return sum(
            linear.out_features * linear.in_features
            for index in range(self.sizes.blocks)
            for linear in self.sizes.block_linears(index)
            if not linear.is_modulation
        )

    @cached_property
    def modulation_weights(self) -> list[int]:
        """Bytes of each block's modulation linears."""
        return [
            sum(
                self.storage.linear(linear)
                for linear in self.sizes.block_linears(index)
                if linear.is_modulation
            )
            for index in range(self.sizes.blocks)
        ]

    @cached_property
    def outer_weights(self) -> int:
        """Bytes of the linears that belong to no block, without modulation's."""
        return sum(
            self.storage.linear(linear)
            for linear in self.sizes.outer_linears()
            if not linear.is_modulation
        )

    @cached_property
    def outer_modulation_weights(self) -> int:
        """Bytes of the time and text embedders' linears and of norm_out's."""
        return sum(
            self.storage.linear(linear)
            for linear in self.sizes.outer_linears()
            if linear.is_modulation
        )

    @cached_property
    def frozen_bytes(self) -> int:
        """Bytes of the transformer's weights, all of them frozen but in full training."""
        outer = self.outer_weights + self.outer_modulation_weights
        return sum(self.block_weights) + sum(self.modulation_weights) + outer

    @cached_property
    def modulation_vectors(self) -> int:
        """Bytes of a batch's shifts, scales and gates."""
        wide = [
            linear
            for linear in self.sizes.linears()
            if linear.is_modulation and "time_text_embed" not in linear.name
        ]
        return 2 * self.batch * sum(linear.out_features for linear in wide)

    @cached_property
    def adapters(self) -> int:
        """Elements of all adapters."""
        return sum(self._adapters_by_block.values())

    @property
    def adapters_of_a_block(self) -> int:
        """Elements of the adapters of the block that has the most."""
        return max(self._adapters_by_block.values(), default=0)

    @cached_property
    def _adapters_by_block(self) -> Counter[str]:
        """Elements of adapters by the module list and the number that linears' names begin with."""
        found: Counter[str] = Counter()
        for linear in self.sizes.linears():
            if (size := self.size_on(linear.name)) is not None:
                kind = KINDS[self.lora_type]
                elements = kind.elements(linear.out_features, linear.in_features, size)
                found[".".join(linear.name.split(".")[:2])] += elements
        if self.trains_all:
            for index in range(self.sizes.blocks):
                block = self.sizes.block_linears(index)[0].name
                found[".".join(block.split(".")[:2])] += self.sizes.norms(index)
        return found
