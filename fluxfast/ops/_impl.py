"""Which implementation of an op runs: `triton`, `native` (the C++ module, on the CPU) or `ref` (plain torch).

`impl="auto"` takes the fastest one that can do the call and says once, through logging, which one that is and why.
An explicit request runs or raises: it never falls back.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import fluxfast._C as native  # noqa: F401

    HAS_NATIVE = True
except ModuleNotFoundError:
    HAS_NATIVE = False

Impl = Literal["auto", "triton", "native", "ref"]

logger = logging.getLogger("fluxfast")
_announced: set[tuple[str, str]] = set()


def resolve(
    op: str, impl: str, tensors: Sequence[Tensor], *, obstacle: str | None = None, ref_suffices: str | None = None
) -> Literal["native", "ref"]:
    """Chooses the implementation of one call of `op` on `tensors`.

    `obstacle` says why only the reference can do this call, `ref_suffices` why nothing beats it on this call; None: neither.
    Raises ValueError if `impl` is unknown, or names one that can't do this call.
    """
    if impl == "ref":
        return "ref"
    if impl == "triton":
        raise ValueError(
            f"{op}: impl='triton' is not available for {tensors[0].device.type} tensors: "
            "fluxfast has no Triton kernel for this op; use impl='auto' or impl='ref'"
        )
    if impl not in ("auto", "native"):
        raise ValueError(f"{op}: impl must be 'auto', 'triton', 'native' or 'ref', not {impl!r}")
    reason = obstacle or _native_obstacle(tensors)
    if impl == "native" and reason is not None:
        raise ValueError(f"{op}: impl='native' can't do this call: {reason}; use impl='auto' or impl='ref'")
    if impl == "auto":
        reason = reason or ref_suffices
    choice: Literal["native", "ref"] = "native" if reason is None else "ref"
    if impl == "auto" and not torch.compiler.is_compiling() and (op, choice) not in _announced:
        _announced.add((op, choice))
        logger.info("%s runs on '%s': %s", op, choice, reason or "float32 tensors on the CPU")
    return choice


def _native_obstacle(tensors: Sequence[Tensor]) -> str | None:
    if not HAS_NATIVE:
        return "the native module fluxfast._C was not built"
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"the native module computes on the CPU and a tensor is on {tensor.device}"
        if tensor.dtype is not torch.float32:
            return f"the native module computes in torch.float32 and a tensor is {tensor.dtype}"
    return None


def launcher(tensor: Tensor, plain: Callable[..., Any], registered: Callable[..., Any]) -> Callable[..., Any]:
    """The plain Python launcher, or the registered op where something has to see the call in place of running it.

    A registered op costs about 60 µs a call in eager mode, so it is kept for torch.compile and for tensor subclasses
    (fake tensors among them), which have no memory that a launcher could read.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return registered
    return plain


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last dimension is contiguous, which is all that the native code asks for; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_like(tensor: Tensor) -> Tensor:
    """Memory for a contiguous tensor of the same shape and dtype; at half the price of `torch.empty`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
