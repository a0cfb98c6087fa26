"""How the ops' functions become custom ops, which torch.compile and tensor subclasses see.

A function that calls kernels or native code asks first whether the call is traced, and if so calls
itself as a registered op:

    def forward(x, *, out, impl):
        if is_traced(x):
            return row_output(_forward_op(x, out=out, impl=impl), out)
        …

    _forward_op = Op("gelu_fwd", forward, fake)
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxfast.ops.device import shapes_suffice
from fluxfast_kernels.parts import Parts, PerPart

# parameters that ops never have: those that tell a function of two parts of its rows, beside those
# of type Parts, and places to write gradients to
NOT_IN_OPS = ("second", "second_row", "da", "db")
# tensors that kernels and native code can read
PLAIN = (Tensor, torch.nn.Parameter)
# an op's name, its arguments by name, and the tensors that it makes
OnCall = Callable[[str, Mapping[str, Any], list[Tensor]], object]

_told: OnCall | None = None


@contextlib.contextmanager
def listening(told: OnCall) -> Iterator[None]:
    """Inside, `told` hears of each op of which only shapes are wanted (`device.pretend`)."""
    global _told
    before, _told = _told, told
    try:
        yield
    finally:
        _told = before


def is_traced(tensor: Tensor) -> bool:
    """Whether something has to see a call on `tensor` as a registered op, in place of running it.

    That is torch.compile; tensor subclasses (fake tensors among them), which have no memory that a
    kernel could read; and meta tensors of which only shapes are wanted (`device.pretend`).
    Everybody else is spared the 60 µs that a registered op costs a call.
    """
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN:
        return True
    return tensor.is_meta and shapes_suffice()


class Op:
    """A function as the custom op fluxfast::<name>, with the function's parameters, all required.

    The op returns a list of the tensors that the function makes: those in what the function
    returns, however nested, less its arguments. `fake` makes empty tensors in that list's place,
    from the arguments by name.

    writes: arguments that the function writes to where they are given. torch can make no functional
    form of an op that writes and returns a list. So a call with one of them is
    fluxfast::<name>_into, which returns nothing and copies what the function makes to a further
    argument, `made`. A function that returns nothing itself needs neither that nor a `fake`.

    Where only shapes are wanted, `fake` answers a call at once and torch sees no op. Only there are
    the rows of a call in two parts, because blocks that torch.compile sees run one part after the
    other: the op itself is that of one part.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., list[Tensor]] | None = None,
        *,
        writes: Sequence[str] = (),
    ) -> None:
        whole = inspect.signature(run, eval_str=True)
        signature = _of_one_part(whole)
        self._name, self._names, self._writes = name, list(signature.parameters), writes
        self._of_parts = [name for name in whole.parameters if name not in self._names]
        self._fake = fake
        self._op: Any = None
        self._into: Any = None

        def op(*args: Any) -> list[Tensor]:
            return _made(run, self._named(args, {}))

        def into(*args: Any) -> None:
            arguments = self._named(args, {})
            made = arguments.pop("made", [])
            for empty, tensor in zip(made, _made(run, arguments), strict=True):
                empty.copy_(tensor)

        if fake is None:
            self._into = _custom_op(name, into, signature, writes, None)
        else:
            self._op = _custom_op(name, op, signature, (), list[Tensor])
            self._op.register_fake(lambda *args: fake(**self._named(args, {})))
        if fake is not None and writes:
            self._names.append("made")
            made = inspect.Parameter(
                "made", inspect.Parameter.KEYWORD_ONLY, annotation=list[Tensor]
            )
            signature = signature.replace(parameters=[*signature.parameters.values(), made])
            self._into = _custom_op(f"{name}_into", into, signature, (*writes, "made"), None)
        if self._into is not None:
            self._into.register_fake(lambda *args: None)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        arguments = self._named(args, kwargs)
        if shapes_suffice():
            made = [] if self._fake is None else self._fake(**arguments)
            if _told is not None:
                _told(self._name, arguments, made)
            return made
        for name in self._of_parts:
            assert arguments.pop(name, None) is None, "a call with parts was traced"
        if self._fake is None:
            self._into(**arguments)
            return []
        if self._into is None or all(arguments[name] is None for name in self._writes):
            return self._op(**arguments)
        made = self._fake(**arguments)
        self._into(**arguments, made=made)
        return made

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._names, args, strict=False)), **kwargs}


def _of_one_part(signature: inspect.Signature) -> inspect.Signature:
    """A function's signature for calls of one part: no operand is a pair."""
    types: dict[Any, Any] = {
        PerPart: Tensor,
        PerPart | None: Tensor | None,
        Sequence[PerPart]: Sequence[Tensor],
        Sequence[PerPart | None]: Sequence[Tensor | None],
    }
    parameters = [
        p.replace(annotation=types.get(p.annotation, p.annotation))
        for p in signature.parameters.values()
        if p.name not in NOT_IN_OPS and p.annotation != Parts | None
    ]
    return signature.replace(parameters=parameters)


def _custom_op(
    name: str,
    run: Callable[..., Any],
    signature: inspect.Signature,
    writes: Sequence[str],
    returns: Any,
) -> Any:
    """`run` as a custom op; torch takes no tensors by keyword alone, so no parameter is that."""
    parameters = [
        inspect.Parameter(p.name, p.POSITIONAL_OR_KEYWORD, annotation=p.annotation)
        for p in signature.parameters.values()
    ]
    declared = inspect.Signature(parameters, return_annotation=returns)
    run.__signature__ = declared  # type: ignore[attr-defined]
    return torch.library.custom_op(f"fluxfast::{name}", run, mutates_args=writes)


def _made(run: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call returns, each once, less its arguments.

    An op's outputs may not share memory, so those that do are copied.
    """
    known = {id(t) for t in _tensors(list(arguments.values()))}
    starts: set[int] = set()
    made = []
    for tensor in _tensors(run(**arguments)):
        if id(tensor) in known:
            continue
        start = tensor.untyped_storage().data_ptr()
        made.append(tensor.clone() if start in starts else tensor)
        known.add(id(tensor))
        starts.add(start)
    return made


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
