"""What a function of tensors asks of the device, recorded once and from then on asked again.

A block's forward asks for the same in every step: some memory, some of our kernels, and a few of
torch's own operations. `record` runs a function and takes this down; `LaunchPlan.replay` does it
again with other tensors, without the function. That takes a microsecond or two a launch, where the
function takes thirty.

A plan knows tensors by number: those that it is given, constants (`ops.tensors.constant`), and
those that it makes. Each is freed after its last use. A kernel takes addresses, so that what only
kernels read as a part of a tensor is an address and an offset, and no tensor is made for it.

Whoever replays a plan sees to it that the tensors are like the recorded ones in shape, strides,
dtype, device and alignment, and that nothing else that the function depends on has changed
(`launch_plans`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fluxfast.model.launch_replay import (
    Call,
    Check,
    Empty,
    Launch,
    LaunchPlan,
    Place,
    Ref,
    Step,
    View,
    make_plan,
    refs_in,
)
from fluxfast.ops import dispatch
from fluxfast_kernels.launch import Addresses, Compared, Launched, hearing, is_constant

# operations that only take memory
_EMPTY = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
)
# operations that wait for the device, so that the host can look at values
_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


class Unplannable(Exception):
    """Something that a plan can't do again; its text says what."""


class _Recorder(TorchDispatchMode):
    """Takes down what torch is asked for inside, and, through `heard`, our own launches."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.constants: dict[int, Tensor] = {}
        self.places: list[Place] = []
        self._dtypes: dict[int, torch.dtype] = {}
        self._numbers: Any = WeakTensorKeyDictionary()
        for tensor in given:
            number = self._new()
            # a tensor that is given twice is known by its first place
            if tensor is not None and tensor not in self._numbers:
                self._numbers[tensor], self._dtypes[number] = number, tensor.dtype

    def _new(self, tensor: Tensor | None = None, place: Place | None = None) -> int:
        number = len(self.places)
        self.places.append(place or Place(number, 0))
        if tensor is not None:
            self._numbers[tensor], self._dtypes[number] = number, tensor.dtype
        return number

    def number_of(self, tensor: Tensor) -> int:
        number = self._numbers.get(tensor)
        if number is None:
            if not is_constant(tensor):
                raise Unplannable("it reads a tensor that it was not given")
            number = self._new(tensor)
            self.constants[number] = tensor
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS or torch.Tag.dynamic_output_shape in func.tags:
            raise Unplannable(f"{name} waits for the device")
        made = func(*args, **kwargs)
        outs = list(made) if isinstance(made, (tuple, list)) else [made]
        if name in _EMPTY:
            self.steps.append(
                Empty(self._new(made), tuple(made.shape), made.stride(), made.dtype, made.device)
            )
            return made
        # before what it returns gets its numbers: it may be what it was given
        refs = [self._refs(value) for value in args]
        named = {name: self._refs(value) for name, value in kwargs.items()}
        if any(isinstance(value, list) and refs_in(value) for value in named.values()):
            raise Unplannable("an operation takes a list of tensors by name")
        base = args[0] if func.is_view else None
        numbers = [self._number_made(out, base) for out in outs]
        views = [self._as_view(out, number) for out, number in zip(outs, numbers, strict=True)]
        if base is not None and all(views):
            self.steps += [view for view in views if view is not None]
        else:
            self.steps.append(Call(func._op, refs, named, numbers, func._schema.is_mutable))
        return made

    def _as_view(self, out: Any, number: int | None) -> View | None:
        """A view as a part of its root; None where it is none, or reads it as another type."""
        if number is None:
            return None
        root, offset = self.places[number]
        if self._dtypes[root] != out.dtype or offset % out.itemsize:
            return None
        return View(number, root, tuple(out.shape), out.stride(), offset // out.itemsize)

    def _refs(self, value: Any) -> Any:
        """An argument with numbers in the place of tensors, which may be in a list of tensors."""
        if isinstance(value, Tensor):
            return Ref(self.number_of(value))
        if isinstance(value, torch.Generator):
            raise Unplannable("it draws random numbers from a generator of its own")
        if not isinstance(value, (tuple, list)) or not any(_has_tensor(part) for part in value):
            return value
        if not all(part is None or isinstance(part, Tensor) for part in value):
            raise Unplannable("an operation takes tensors in lists of lists")
        return [None if part is None else Ref(self.number_of(part)) for part in value]

    def _number_made(self, out: Any, base: Tensor | None) -> int | None:
        """The number of something that an operation returned, where it is a new tensor."""
        if not isinstance(out, Tensor) or out in self._numbers:
            return None
        place = None
        if base is not None:
            if base.untyped_storage()._cdata != out.untyped_storage()._cdata:
                raise Unplannable("a view lies in other memory than what it is a view of")
            root, offset = self.places[self.number_of(base)]
            # an empty tensor has no address
            step = out.data_ptr() - base.data_ptr() if out.numel() and base.numel() else 0
            place = Place(root, offset + step)
        return self._new(out, place)

    def heard(self, heard: Launched | Compared) -> None:
        if isinstance(heard, Launched):
            self._launched(heard)
        else:
            places = [self.places[self.number_of(t)] for t in heard.tensors]
            self.steps.append(Check(heard.holds, places, heard.found))

    def _launched(self, launched: Launched) -> None:
        from fluxfast_kernels.relaunch import FIRST, prepare

        if not all(_is_plain(value) for value in launched.numbers.values()):
            raise Unplannable("a kernel's launch numbers hold more than numbers")
        try:
            run, arguments = prepare(launched)
        except ValueError as error:
            raise Unplannable(str(error)) from None
        slots, tables = [], []
        for i, arg in enumerate(launched.args, FIRST):
            if isinstance(arg, Tensor):
                slots.append((i, self.places[self.number_of(arg)]))
                arguments[i] = None
            elif isinstance(arg, Addresses):
                places = [self.places[self.number_of(t)] for t in arg.tensors]
                tables.append((i, arg.table, places))
                arguments[i] = None
            elif not _is_plain(arg):
                raise Unplannable(f"a kernel takes a {type(arg).__name__}")
        self.steps.append(Launch(run, arguments, slots, tables))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    """Whether an argument of a kernel is the same each time: a number, or a type of Triton's."""
    return value is None or isinstance(value, (bool, int, float, str)) or _is_triton_type(value)


def _is_triton_type(value: Any) -> bool:
    return type(value).__module__.startswith("triton.") and type(value).__name__ == "dtype"


class _NativeRefused:
    """In the place of the native module, whose calls leave no trace here."""

    def __init__(self, native: Any) -> None:
        self._native, self._thread = native, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if threading.get_ident() == self._thread:
            raise Unplannable("it calls the native module")
        return getattr(self._native, name)


# the native module is refused to one thread at a time
_one_recording = threading.Lock()


@contextmanager
def _without_native() -> Iterator[None]:
    native = getattr(dispatch, "native", None)
    with _one_recording:
        dispatch.native = _NativeRefused(native)  # type: ignore[assignment]
        try:
            yield
        finally:
            dispatch.native = native  # type: ignore[assignment]


def record(
    function: Callable[[], Sequence[Tensor | None]], given: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], LaunchPlan]:
    """What a function returns, and the plan that makes it again.

    function: pure, and of the given tensors alone. Raises Unplannable for what can't be recorded.
    """
    recorder = _Recorder(given)
    with _without_native(), hearing(recorder.heard), recorder:
        made = function()
    outs = [None if out is None else recorder.number_of(out) for out in made]
    plan = make_plan(
        recorder.steps,
        given=len(given),
        constants=recorder.constants,
        tensors=len(recorder.places),
        outs=outs,
    )
    return made, plan
