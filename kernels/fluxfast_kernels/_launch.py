"""Launch numbers as data, and what every launcher needs: block sizes per architecture, device keys, ahead-of-time variants.

An op's table maps an architecture key ("sm_90", "gfx942", …) to its numbers; "default" holds safe ones for every target.
Tuning on a device adds a row there and nothing else.
"""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ContextManager

import torch
import triton
from torch import Tensor

# what `fluxfast-bench aot` compiles for: the key, Triton's back end, its architecture, and the width of a warp
AOT_TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}

# architectures whose tensor cores, or at least whose conversions, know e4m3fn
E4M3_TARGETS: tuple[str, ...] = ("sm_89", "sm_90", "gfx942", "gfx1100")

LaunchTable = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class AotVariant:
    """One kernel as a launcher would specialise it, for compiling without a device.

    signature: argument → Triton type ("*bf16", "i32", "fp32"), constexprs left out; constexprs: the rest, None for an absent
    pointer. `divisible` names the integers that are multiples of 16 (pointers always are). `targets`: keys of AOT_TARGETS.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = field(default_factory=lambda: tuple(AOT_TARGETS))


def next_pow2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _arch_of(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_key(device: torch.device) -> str:
    """A launch table's key for a device: "sm_90", "gfx942"; "default" where it is no GPU."""
    if device.type != "cuda":
        return "default"
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


def launch_numbers(table: LaunchTable, device: torch.device) -> Mapping[str, int]:
    """The row of `table` for a device: block sizes, num_warps, num_stages."""
    return table.get(arch_key(device)) or table["default"]


def on_device(tensor: Tensor) -> ContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches; free where it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


LAUNCH: dict[str, LaunchTable] = {}
