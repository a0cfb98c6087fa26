"""What is to be checked: a device, the formats and modes of a run, and the sizes to check them at.

All are plain values, so that a scope travels as JSON to the processes that check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fluxfast.ops import device as devices
from fluxfast.ops import dispatch
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.quant import FORMATS

# stands among the formats for a base that is not quantised
PLAIN = "plain"


@dataclass(frozen=True)
class Sizes:
    """The sizes to check at.

    tokens: several lengths for the fused ops.
    products: several numbers of rows for products.
    attention: several lengths for attention.
    product_heads, model_heads: the width, in heads, of products and of the shallow model.
    image, text: the shallow model's tokens; an image is (rows, columns).
    timed: how many tokens rates are measured with; 0 measures none.
    weights: the rows of the weights that formats are checked on.
    """

    heads: int
    head_dim: int
    batch: int
    tokens: tuple[int, ...]
    products: tuple[int, ...]
    attention: tuple[int, ...]
    product_heads: int
    model_heads: int
    image: tuple[int, int]
    text: int
    timed: int
    weights: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


# FLUX.1's width. A prime number of tokens fits no tile; 1536 and 4608 tokens are 512 and 1024 px.
# Products of up to 64 rows may read stored codes, and modulation's have one row a sample; adapters'
# gradients come from one pass over 4608 rows, and from two over few
FULL_GPU = Sizes(
    24,
    128,
    2,
    (1, 577, 1536),
    (1, 33, 577, 4608),
    (577, 1536, 4608),
    24,
    24,
    (13, 17),
    77,
    4608,
    192,
)
SHORT_GPU = Sizes(24, 128, 1, (577,), (1, 577, 4608), (577, 1536), 24, 24, (13, 17), 77, 0, 64)
FULL_CPU = Sizes(24, 128, 1, (1, 77), (33, 77), (77, 577), 24, 4, (5, 7), 13, 128, 64)
# an exhaustive scope has forty products, which would take minutes at full width
EVERY_CPU = replace(FULL_CPU, product_heads=4)
# a run checks these at its first start, and should take less than a second
SHORT_CPU = Sizes(4, 128, 1, (5,), (9,), (9,), 4, 2, (3, 4), 7, 0, 8)
# Triton's interpreter takes milliseconds for each program of a launch
INTERPRETED = Sizes(2, 32, 2, (1, 7), (5,), (9,), 2, 2, (3, 4), 7, 0, 5)


@dataclass(frozen=True)
class Scope:
    """What is to be checked.

    dtype: of the activations, "bfloat16" or "float32".
    formats: of the base: keys of `quant.FORMATS`, or PLAIN.
    computes: what products run in, as `ops.row_quant` says it: "same" or the name of codes.
    exhaustive: every instruction set and implementation there is, not only what `auto` would take.
    interpreted: Triton's kernels too, in its interpreter.

    updates: the optimisers' kernels, by their names among fluxfast's ops.

    The other fields say whether, or with what, a run uses a feature.
    """

    device: str
    dtype: str
    formats: tuple[str, ...] = (PLAIN,)
    computes: tuple[str, ...] = ("same",)
    outliers: int = 0
    rank: int = 16
    lora_scale: float = 1.0
    dropout: float = 0.0
    adapter_dtype: str = "float32"
    updates: tuple[str, ...] = ("adamw_bf16",)
    routes: bool = False
    masks: bool = False
    graphs: bool = False
    streams: bool = False
    modulation_ahead: bool = False
    exhaustive: bool = False
    interpreted: bool = False
    short: bool = False
    sizes: Sizes = field(default=FULL_GPU)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scope:
        return cls(**_tuples(values) | {"sizes": Sizes(**_tuples(values["sizes"]))})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def sizes_for(device: torch.device, *, short: bool, interpreted: bool) -> Sizes:
    """The sizes that a device can check in reasonable time."""
    if interpreted:
        return INTERPRETED
    if device.type == "cpu":
        return SHORT_CPU if short else FULL_CPU
    return SHORT_GPU if short else FULL_GPU


def everything(device: torch.device, *, interpreted: bool = False) -> Scope:
    """A scope of all formats and modes that there are."""
    on_gpu = device.type == "cuda"
    return Scope(
        device=str(device),
        dtype="bfloat16" if on_gpu else "float32",
        formats=(PLAIN, *FORMATS),
        computes=("same", *(compute for compute in CODES if multiplies(compute, device))),
        outliers=4,
        dropout=0.1,
        adapter_dtype="bfloat16" if on_gpu else "float32",
        updates=("adamw_bf16", "blockwise_adamw", "blockwise_lion"),
        routes=True,
        masks=True,
        graphs=True,
        streams=True,
        modulation_ahead=True,
        exhaustive=True,
        interpreted=interpreted,
        sizes=EVERY_CPU
        if not on_gpu and not interpreted
        else sizes_for(device, short=False, interpreted=interpreted),
    )


def multiplies(compute: str, device: torch.device) -> bool:
    """Whether the device can multiply these codes; a CPU and Triton's interpreter emulate it."""
    return compute != "e4m3" or not dispatch.HAS_TRITON or devices.multiplies(compute, device)
