"""Text and image of a double block in one call of a row-wise op.

x [R, D] then holds the text's rows and after them the image's (`Parts`), and an operand that each
has its own of (a scale, a shift, a gate) is a pair, the text's and the image's. Only Triton's
kernels see two parts.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias, overload

from torch import Tensor

from fluxfast.ops.tensors import dense_rows
from fluxfast_kernels.parts import Parts as Parts
from fluxfast_kernels.parts import PerPart as PerPart

# the gradient of an operand, or None: it has the operand's form, which the caller knows and a type
# cannot say
FormOfOperand: TypeAlias = Any


def tensors_of(*operands: PerPart) -> Iterator[Tensor]:
    """The tensors of operands, of which each has one, or one a part."""
    for operand in operands:
        yield from (operand,) if isinstance(operand, Tensor) else operand


def in_form_of(operand: PerPart, tensors: Iterator[Tensor]) -> PerPart:
    """The next of `tensors`, or the next two as a pair, as `operand` is one."""
    return next(tensors) if isinstance(operand, Tensor) else (next(tensors), next(tensors))


@overload
def dense_vectors(operand: PerPart) -> PerPart: ...
@overload
def dense_vectors(operand: PerPart | None) -> PerPart | None: ...
def dense_vectors(operand: PerPart | None) -> PerPart | None:
    """`dense_rows` of an operand's tensors, where there is one."""
    if isinstance(operand, tuple):
        return dense_rows(operand[0]), dense_rows(operand[1])
    return None if operand is None else dense_rows(operand)


@overload
def only(operand: PerPart) -> Tensor: ...
@overload
def only(operand: PerPart | None) -> Tensor | None: ...
def only(operand: PerPart | None) -> Tensor | None:
    """The tensor of an operand of one part, which is all that most implementations take."""
    assert not isinstance(operand, tuple), "two parts are only for impl='triton'"
    return operand
