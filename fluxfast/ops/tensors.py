"""Small helpers for tensors that all ops share."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fluxfast.ops.device import autocast_dtype

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last dimension is contiguous, else a copy.

    Native code and kernels ask for no more: rows may lie any distance apart.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts, in `torch.inference_mode`."""
    return None if tensor.is_inference() else tensor._version


def contiguous_like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape and dtype.

    It takes half the time of `torch.empty`.
    """
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def divide(tensor: Tensor, divisor: float) -> Tensor:
    """tensor / divisor, each quotient rounded as IEEE does, with the same bits on every device.

    On a GPU torch divides by a plain number as a product with its reciprocal, which is often one
    step off the quotient. It divides exactly by a tensor that is on the device.
    """
    return tensor / tensor.new_full((), divisor)


def full_dtype(tensor: Tensor) -> torch.dtype:
    """What references compute in: fp32, or fp64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def own_dtypes(backward: _Backward) -> _Backward:
    """Decorates an autograd.Function's backward that multiplies: autocast is off inside.

    A caller may run the backward pass under autocast, which would change the products' dtypes.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device.type
        if autocast_dtype(device) is None:
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return cast(_Backward, run)
