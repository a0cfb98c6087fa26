"""A launch that is made again, by the compiled kernel itself.

Triton's JIT binds the arguments, specialises on them, and looks the kernel up. That takes some ten
microseconds and comes to the same result each time, as long as addresses are as aligned as they
were and all other arguments are the same. Here the compiled kernel is called directly, with
addresses in the place of tensors.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxfast_kernels.launch import Addresses, Launched, interpreted

# where the arguments that `prepare` returns have the stream, and where the kernel's own begin
STREAM, FIRST = 3, 9


def prepare(launched: Launched) -> tuple[Callable[..., Any], list[Any]]:
    """What launches again, and its arguments: call `run(*arguments)`.

    `arguments[STREAM]` is for the handle of the stream. From FIRST on they are the kernel's own, in
    order; the caller writes the address of a tensor, or of a table, in its place. Raises ValueError
    for a launch that can't be made again so.
    """
    grid = (*launched.grid, 1, 1)[:3]
    if launched.on_launch is not None:
        return _pretended(launched), [*grid, 0, *[None] * 5, *launched.args]
    if interpreted():
        return _interpreted(launched), [*grid, 0, *[None] * 5, *launched.args]
    kernel, compiled = launched.kernel, launched.compiled
    if kernel.pre_run_hooks:
        raise ValueError(f"{kernel.__name__}: something wants to hear of its launches")
    # the kernel's parameters that `launch` was given by name are constants of the compiled kernel,
    # which its launcher takes and leaves aside
    rest = list(kernel.signature.parameters.values())[len(launched.args) :]
    named = [launched.numbers.get(parameter.name, parameter.default) for parameter in rest]
    # the first look at `run` loads the kernel, and with it its function
    run = compiled.run
    fixed = [compiled.function, compiled.packed_metadata, None, None, None]
    return run, [*grid, 0, *fixed, *launched.args, *named]


def watched() -> bool:
    """Whether somebody, such as a profiler, wants to hear of Triton's launches.

    A launch that is made again tells nobody.
    """
    import triton

    hooks = (
        triton.knobs.runtime.launch_enter_hook,
        triton.knobs.runtime.launch_exit_hook,
    )
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def current_stream(device: torch.device) -> int:
    """The handle of the stream on which a device's launches are queued; 0 where there is none."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def _pretended(launched: Launched) -> Callable[..., None]:
    kernel, numbers, on_launch = launched.kernel, launched.numbers, launched.on_launch
    assert on_launch is not None

    def run(*arguments: Any) -> None:
        on_launch(kernel, arguments[FIRST:], numbers)

    return run


def _interpreted(launched: Launched) -> Callable[..., None]:
    kernel, numbers = launched.kernel[launched.grid], launched.numbers
    dtypes = [
        torch.int64 if isinstance(arg, Addresses) else getattr(arg, "dtype", None)
        for arg in launched.args
    ]

    def run(*arguments: Any) -> None:
        args = zip(arguments[FIRST:], dtypes, strict=True)
        kernel(*(arg if dtype is None else _at(arg, dtype) for arg, dtype in args), **numbers)

    return run


def _at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins at an address of the CPU's, for the interpreter, which reads from there.

    An empty tensor, whose address is 0, has nothing to read.
    """
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_byte * dtype.itemsize).from_address(address), dtype=dtype)
