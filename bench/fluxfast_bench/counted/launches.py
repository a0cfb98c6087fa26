"""The kernels that a step launches, as Triton's JIT tells them apart.

The JIT compiles a kernel anew for each dtype of its pointers, for integers that are 1 or multiples
of 16, and for each constant. So a step of some 3,000 launches has some 40 kernels, and what matters
of a launch is small enough to be sent to another process, which compiles it. `meta_step.recorded`
finds the launches of a step.

Workers import this module, so it imports little.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast_bench.counted.compilers import end_with_parent


# no NamedTuple, which Triton would take for a tuple of arguments
@dataclass(frozen=True)
class Pointer:
    """What Triton's JIT looks at in a tensor: its dtype, and if its address is a multiple of 16."""

    dtype: torch.dtype
    aligned: bool = True

    def data_ptr(self) -> int:
        return 0 if self.aligned else 4


@dataclass(frozen=True)
class Launch:
    """A launch of `module`.`kernel`, with its arguments in order and its launch numbers by name.

    Tensors are `Pointer`s. Two launches are equal if the JIT compiles one kernel for both.
    """

    module: str
    kernel: str
    args: tuple[Any, ...]
    numbers: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        words = [arg.dtype if isinstance(arg, Pointer) else arg for arg in self.args]
        told = [str(word).removeprefix("torch.") for word in words] + [
            f"{name}={value}" for name, value in self.numbers
        ]
        return f"{self.kernel}({', '.join(told)})"


def launch_of(kernel: Any, args: tuple[Any, ...], numbers: Mapping[str, Any]) -> Launch:
    """What `fluxfast_kernels.launch.launch` was called with."""
    params = zip(kernel.params, args, strict=False)
    told = tuple(
        arg if param.is_constexpr else _argument(arg, param.do_not_specialize)
        for param, arg in params
    )
    return Launch(kernel.fn.__module__, kernel.fn.__name__, told, tuple(sorted(numbers.items())))


def _argument(arg: Any, fixed: bool) -> Any:
    if isinstance(arg, Tensor):
        return Pointer(arg.dtype, arg.data_ptr() % 16 == 0)
    if isinstance(arg, float):
        return 1.0
    if arg is None or isinstance(arg, bool):
        return arg
    # an integer stands for all that are specialised alike
    large = 0 if -(2**31) <= arg < 2**31 else 1 << 40
    if fixed:
        return large + 3
    return 1 if arg == 1 else large + (16 if arg % 16 == 0 else 3)


def compiled(launch: Launch) -> Any:
    """Triton's kernel for a launch, and its launcher, compiled by the JIT for the active driver.

    Nothing is launched.
    """
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    made = kernel.run(*launch.args, grid=(1,), warmup=True, **dict(launch.numbers))
    made._init_handles()
    return made


def prepare_jit(cache: str, target: str) -> None:
    """In a worker: from now on Triton's JIT compiles for `target`, into the folder `cache`.

    Where `cache` is empty it is the cache that the environment names.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.pop("TRITON_INTERPRET", None)
    if cache:
        os.environ["TRITON_CACHE_DIR"] = cache
    from fluxfast_bench.counted import mock_gpu

    mock_gpu.activate(target)


def compile_launch(launch: Launch) -> dict[str, Any]:
    """In a worker: the seconds of compiling, and why it failed where it did.

    Any error of the compiler is such a result.
    """
    begun = time.perf_counter()
    try:
        compiled(launch)
    except Exception as error:
        text = " ".join(str(error).split())
        return {
            "seconds": round(time.perf_counter() - begun, 3),
            "reason": f"{type(error).__name__}: {text[:300]}",
        }
    return {"seconds": round(time.perf_counter() - begun, 3)}
