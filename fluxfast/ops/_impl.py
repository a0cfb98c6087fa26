"""Which implementation of an op runs: `triton` (GPUs), `native` (the C++ module, on the CPU) or `ref` (plain torch).

`impl="auto"` takes the fastest one that can do the call and says once, through logging, which one that is and why.
An explicit request runs or raises: it never falls back. Triton is imported when a kernel is first asked for, not before.
"""

import functools
import importlib.util
import inspect
import logging
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from fluxfast.ops import verdicts

try:
    import fluxfast._C as native  # noqa: F401

    HAS_NATIVE = True
except ModuleNotFoundError:
    HAS_NATIVE = False

HAS_TRITON = importlib.util.find_spec("triton") is not None

Impl = Literal["auto", "triton", "native", "ref"]
# what `resolve` makes of an Impl
Backend = Literal["triton", "native", "ref"]

_Backward = TypeVar("_Backward", bound=Callable[..., Any])
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger("fluxfast")
_announced: set[tuple[str, str]] = set()


def resolve(
    op: str,
    impl: str,
    tensors: Sequence[Tensor],
    *,
    cast: Sequence[Tensor] = (),
    obstacle: str | None = None,
    native_obstacle: str | None = None,
    ref_suffices: str | None = None,
) -> Backend:
    """Chooses the implementation of one call of `op` on `tensors`, and on tensors that it will `cast` to their dtype.

    `obstacle` says why only the reference can do this call, `native_obstacle` why the native module can't, and `ref_suffices`
    why on the CPU nothing beats the reference; None: no such thing.
    Raises ValueError if `impl` is unknown, or names one that can't do this call or failed its check here (`verdicts`).
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be 'auto', 'triton', 'native' or 'ref', not {impl!r}")
    if impl == "ref":
        return "ref"
    wanted: Backend = typing.cast(Backend, impl)
    if impl == "auto":
        wanted = "triton" if tensors[0].is_cuda else "native"
    if wanted == "triton":
        reason = obstacle or _triton_obstacle((*tensors, *cast))
    else:
        reason = obstacle or native_obstacle or _native_obstacle(tensors)
    verdict = None if reason is not None else verdicts.failed(op, wanted)
    reason = reason or verdict
    if impl != "auto":
        if reason is not None:
            raise ValueError(f"{op}: impl={impl!r} can't do this call: {reason}; use impl='auto' or impl='ref'")
        return wanted
    if wanted == "native":
        reason = reason or ref_suffices
    choice: Backend = wanted if reason is None else "ref"
    if not torch.compiler.is_compiling() and (op, choice) not in _announced:
        _announced.add((op, choice))
        fits = "tensors on a GPU" if choice == "triton" else "float32 tensors on the CPU"
        tell = logger.info if verdict is None else logger.warning
        tell("%s runs on '%s': %s", op, choice, f"not on '{wanted}': {verdict}" if verdict else reason or fits)
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
            return f"the Triton kernels take float32, float16 and bfloat16 and a tensor is {tensor.dtype}"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from fluxfast_kernels._launch import interpreted

    return interpreted()


def register(plain: Callable[..., list[Tensor]]) -> Any:
    """A launcher as the custom op fluxfast::<its name>; it returns a list, of which tensors that share memory are copied.

    An op's outputs may not share any.
    """

    @functools.wraps(plain)
    def op(*args: Any) -> list[Tensor]:
        seen: set[int] = set()
        separate = []
        for out in plain(*args):
            start = out.untyped_storage().data_ptr()
            separate.append(out.clone() if start in seen else out)
            seen.add(start)
        return separate

    return torch.library.custom_op(f"fluxfast::{plain.__name__}", op, mutates_args=())


class WritingOp:
    """A launcher that can be given tensors to write to, its arguments `writes`, as two custom ops.

    Without any it is fluxfast::<its name>. With one it is fluxfast::<its name>_into, which returns nothing, as torch can make
    no functional form of an op that writes and returns a list: what the launcher returns comes after its arguments, as a list
    to be filled.
    """

    def __init__(self, plain: Callable[..., list[Tensor]], writes: Sequence[str]) -> None:
        def into(*args: Any) -> None:
            for made, out in zip(args[-1], plain(*args[:-1]), strict=True):
                made.copy_(out)

        names = list(inspect.signature(plain).parameters)
        self._writes = [names.index(name) for name in writes]
        self._op = register(plain)
        schema = torch.library.infer_schema(plain, mutates_args=writes).removesuffix(") -> Tensor[]")
        self._into = torch.library.custom_op(
            f"fluxfast::{plain.__name__}_into",
            into,
            mutates_args=(*writes, "made"),
            schema=f"{schema}, Tensor(made!)[] made) -> ()",
        )

    def register_fake(self, fake: Callable[..., list[Tensor]]) -> None:
        """`fake` makes empty tensors for what the launcher returns."""
        self._op.register_fake(fake)
        self._into.register_fake(lambda *args: None)
        self._fake = fake

    def __call__(self, *args: Any) -> list[Tensor]:
        if all(args[i] is None for i in self._writes):
            return self._op(*args)
        made = self._fake(*args)
        self._into(*args, made)
        return made


def launcher(tensor: Tensor, plain: Callable[..., Any], registered: Callable[..., Any]) -> Callable[..., Any]:
    """The plain Python launcher, or the registered op where something has to see the call in place of running it.

    A registered op costs about 60 µs a call in eager mode, so it is kept for torch.compile and for tensor subclasses
    (fake tensors among them), which have no memory that a launcher could read.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return registered
    return plain


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last dimension is contiguous, which is all that native code and kernels ask for; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_like(tensor: Tensor) -> Tensor:
    """Memory for a contiguous tensor of the same shape and dtype; at half the price of `torch.empty`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def full_dtype(tensor: Tensor) -> torch.dtype:
    """What references compute in: fp32, or fp64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def own_dtypes(backward: _Backward) -> _Backward:
    """For an autograd.Function's backward that multiplies: autocast, where somebody runs a backward pass under it, is off."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return cast(_Backward, run)
