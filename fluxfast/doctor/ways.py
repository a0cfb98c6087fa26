"""The implementations of an op that can be checked here, and what to do where one fails.

As in `ops.verdicts`, an implementation is a *way* to do *what*: "triton" is a way to do "gelu".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from fluxfast.doctor.scope import Scope
from fluxfast.ops import dispatch

NO_NATIVE_BUILD = (
    "the native module was not built: a C++ compiler and `pip install --force-reinstall "
    "fluxfast` build it"
)

WAY_OUT = {
    "triton": (
        "`auto` takes the reference in its place: slower, and right. Another Triton, PyTorch or "
        "driver may cure it"
    ),
    "native": (
        "`auto` takes PyTorch in its place. Rebuild the module (pip install --force-reinstall "
        "--no-cache-dir fluxfast)"
    ),
}


def ways(scope: Scope) -> Iterator[tuple[str, str, str | None]]:
    """The implementations to check, each as (name, how check names say it, instruction set).

    The instruction set is the native module's, or None.
    """
    if scope.torch_device.type == "cuda":
        yield "triton", "Triton", None
        return
    if dispatch.HAS_NATIVE:
        own = dispatch.native.cpu_isa()
        for isa in dispatch.native.cpu_isas() if scope.exhaustive else [own]:
            yield "native", f"native {isa}", isa
    else:
        yield "native", "native", None
    if scope.interpreted:
        yield "triton", "Triton, interpreted", None


def with_isa(call: Callable[..., Any], isa: str | None) -> Callable[..., Any]:
    """The call with the native module on an instruction set, and then back on its own."""
    if isa is None:
        return call

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        own = dispatch.native.cpu_isa()
        dispatch.native.use_cpu_isa(isa)
        try:
            return call(*args, **kwargs)
        finally:
            dispatch.native.use_cpu_isa(own)

    return run


def obstacle_of(impl: str, scope: Scope, *, native: str | None = None) -> str | None:
    """Why an implementation can't be checked here; None if it can.

    native: why the native module can't do this op at all.
    """
    if impl == "triton":
        return None if dispatch.HAS_TRITON else "triton is not installed"
    if not dispatch.HAS_NATIVE:
        return NO_NATIVE_BUILD
    if scope.dtype != "float32":
        return f"the native module computes in float32, and the run in {scope.dtype}"
    return native
