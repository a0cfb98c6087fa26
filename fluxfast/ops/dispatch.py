"""Which implementation of an op runs: `triton` on GPUs, `native` on the CPU, or `ref`.

`native` is the C++ module, `ref` is plain torch. `impl="auto"` takes the fastest one that can do
the call and says once, through logging, which one that is and why. An explicit request runs or
raises: it never falls back. Triton is imported when a kernel is first asked for, not before.
"""

import importlib.util
import logging
import typing
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fluxfast.config.precision_words import in_words
from fluxfast.ops import verdicts
from fluxfast.ops.device import constant_when_compiled, pretending

try:
    import fluxfast._C as native  # noqa: F401

    HAS_NATIVE = True
except ModuleNotFoundError:
    HAS_NATIVE = False

HAS_TRITON = importlib.util.find_spec("triton") is not None

Impl = Literal["auto", "triton", "native", "ref"]
# what `resolve` makes of an Impl
Backend = Literal["triton", "native", "ref"]

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger("fluxfast")
_announced: set[tuple[str, str, bool]] = set()


def resolve(
    op: str,
    impl: str,
    tensors: Sequence[Tensor],
    *,
    cast: Sequence[Tensor] = (),
    obstacle: str | None = None,
    native_obstacle: str | None = None,
    triton_obstacle: str | None = None,
    ref_suffices: str | None = None,
) -> Backend:
    """Chooses the implementation of one call of `op` on `tensors`.

    cast: further tensors that the op casts to their dtype. `obstacle` says why only the reference
    can do this call, `native_obstacle` and `triton_obstacle` why one of the two can't, and
    `ref_suffices` why on the CPU nothing beats the reference; None where there is no such reason.
    Raises ValueError if `impl` is unknown, or if it names one that can't do this call or that
    failed its check here (`verdicts`).
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be 'auto', 'triton', 'native' or 'ref', not {impl!r}")
    if impl == "ref":
        return "ref"
    if pretending():
        return "triton" if (obstacle or triton_obstacle) is None else "ref"
    wanted: Backend = typing.cast(Backend, impl)
    if impl == "auto":
        wanted = "triton" if tensors[0].is_cuda else "native"
    if wanted == "triton":
        reason = obstacle or triton_obstacle or _triton_obstacle((*tensors, *cast))
    else:
        reason = obstacle or native_obstacle or _native_obstacle(tensors)
    verdict = None if reason is not None else verdicts.failed(op, wanted)
    reason = reason or verdict
    if impl != "auto":
        if reason is not None:
            raise ValueError(
                f"{op}: impl={impl!r} can't do this call: {reason}; use impl='auto' or impl='ref'"
            )
        return wanted
    if wanted == "native":
        reason = reason or ref_suffices
    choice: Backend = wanted if reason is None else "ref"
    said = (op, choice, verdict is not None)
    if not torch.compiler.is_compiling() and said not in _announced:
        _announced.add(said)
        fits = "tensors on a GPU" if choice == "triton" else "float32 tensors on the CPU"
        # on a GPU it is slow, and nobody would expect it
        is_surprise = verdict is not None or (wanted == "triton" and choice == "ref")
        tell = logger.warning if is_surprise else logger.info
        tell(
            "%s runs on '%s': %s",
            in_words(op),
            choice,
            f"not on '{wanted}': {verdict}" if verdict else reason or fits,
        )
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


def _triton_obstacle(tensors: Sequence[Tensor]) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    for tensor in tensors:
        if not (tensor.is_cuda or (tensor.is_cpu and _interpreted())):
            return (
                f"Triton's kernels run on a GPU and a tensor is on {tensor.device} "
                "(TRITON_INTERPRET=1, set before Triton is imported, runs them on the CPU, slowly)"
            )
        if tensor.device != tensors[0].device:
            return f"its tensors are on {tensors[0].device} and on {tensor.device}"
        if tensor.dtype not in _TRITON_DTYPES:
            return (
                "the Triton kernels take float32, float16 and bfloat16 and a tensor is "
                f"{tensor.dtype}"
            )
    return None


@constant_when_compiled
def _interpreted() -> bool:
    from fluxfast_kernels.launch import interpreted

    return interpreted()
