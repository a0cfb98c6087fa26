"""What a device can do, asked in one place; and a GPU that is not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# Compute capabilities of NVIDIA GPUs from which our kernels multiply values of a kind on tensor
# cores. Those of 7.5 have int8, but Triton compiles no products for them.
LEAST_CAPABILITY = {"same": (8, 0), "int8": (8, 0), "e4m3": (8, 9)}
# AMD's architectures with matrix products of e4m3: MI300, MI350, RDNA 4
AMD_E4M3 = ("gfx94", "gfx95", "gfx12")

# How much of a sum of e4m3 products an NVIDIA GPU may lose. A tensor core of Hopper's adds 32
# products at a time, and cuts each of them some 13 bits below the largest (DeepSeek-V3's report,
# arXiv 2412.19437, section 3.5.2). At the most that is 32 · 2⁻¹³ of the largest product, and twice
# that part of a sum half as large. On an H200, sums of 16 and of 40 products were off by 9e-6.
E4M3_SUM_LOSS = 2.0**-7

# a kernel, its arguments in order, and its launch numbers
OnLaunch = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]

# inside `pretend`: whether launches are reported, or ops only say what shapes they would return
_pretence: Literal["launches", "shapes"] | None = None


def multiplies(compute: str, device: torch.device) -> bool:
    """Whether a device has matrix products of "same" (bf16), "int8" or "e4m3" in hardware.

    On a CPU, 8-bit products are emulated where they are asked for, so the answer is yes.
    """
    if device.type != "cuda":
        return True
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return compute != "e4m3" or architecture.startswith(AMD_E4M3)
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY[compute]


def sum_loss(compute: str, device: torch.device) -> float:
    """How much of its sums a device loses in products of `compute`, beside the rounding of fp32."""
    lossy = compute == "e4m3" and device.type == "cuda" and torch.version.hip is None
    return E4M3_SUM_LOSS if lossy else 0.0


def usable_cores() -> int:
    """The processor's cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU; 0 for everything else.

    It is 0, too, for a fake tensor's "cuda" where there is no GPU to ask.
    """
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast has chosen on a type of device; None where autocast is off.

    torch knows no autocast of meta tensors, not even that it is off.
    """
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def constant_when_compiled(function: Function) -> Function:
    """Tells torch.compile to call `function` while it traces, and to take the result as a constant.

    This is what `torch.compiler.assume_constant_result` does. But that imports torch._dynamo, which
    costs a second of processor time in every process that needs the ops and never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def pretend(arch: str, on_launch: OnLaunch | None) -> Iterator[None]:
    """Inside, tensors on the CPU or on meta stand for tensors on a GPU of that architecture.

    All ops choose as on that GPU: Triton's kernels, flash attention. A launch runs nothing and
    calls `on_launch(kernel, args, numbers)` instead. With meta tensors a whole training step of the
    full model can be counted or measured so, without memory; with tensors on the CPU, what Python
    takes for it. arch: a key of the kernels' launch tables, such as "sm_90" or "gfx942".

    With `on_launch` None no kernel is asked for either: on meta tensors, ops only make tensors of
    the shapes that they would return. This is all that a measurement of memory needs, and Triton
    need not be installed for it.
    """
    from fluxfast_kernels.launch import pretend as pretend_launches

    global _pretence
    before, _pretence = _pretence, "shapes" if on_launch is None else "launches"
    try:
        with pretend_launches(arch, on_launch or _unexpected_launch):
            yield
    finally:
        _pretence = before


def _unexpected_launch(kernel: Any, args: tuple[Any, ...], numbers: Mapping[str, Any]) -> None:
    raise AssertionError(f"{kernel}: a launch where only shapes were asked for")


def pretending() -> bool:
    """Whether the caller is inside `pretend`."""
    return _pretence is not None


def shapes_suffice() -> bool:
    """Whether the caller is inside a `pretend` that wants to hear of no launches."""
    return _pretence == "shapes"
