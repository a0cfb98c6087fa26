"""How launchers become custom ops, which torch.compile and tensor subclasses see in place of
running them.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxfast.ops.device import shapes_suffice


def register(plain: Callable[..., list[Tensor]]) -> Any:
    """A launcher as the custom op fluxfast::<its name>; it returns a list, of which tensors that
    share memory are copied.

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

    Without any it is fluxfast::<its name>. With one it is fluxfast::<its name>_into, which returns
    nothing, as torch can make no functional form of an op that writes and returns a list: what the
    launcher returns comes after its arguments, as a list to be filled.
    """

    def __init__(self, plain: Callable[..., list[Tensor]], writes: Sequence[str]) -> None:
        def into(*args: Any) -> None:
            for made, out in zip(args[-1], plain(*args[:-1]), strict=True):
                made.copy_(out)

        names = list(inspect.signature(plain).parameters)
        self._writes = [names.index(name) for name in writes]
        self._op = register(plain)
        schema = torch.library.infer_schema(plain, mutates_args=writes).removesuffix(
            ") -> Tensor[]"
        )
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


def launcher(
    tensor: Tensor, plain: Callable[..., Any], registered: Callable[..., Any]
) -> Callable[..., Any]:
    """The plain Python launcher, or the registered op where something has to see the call in place
    of running it.

    A registered op costs about 60 µs a call in eager mode, so it is kept for torch.compile, for
    tensor subclasses (fake tensors among them), which have no memory that a launcher could read,
    and for meta tensors of which only shapes are wanted (`device.pretend`).
    """
    if (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or (tensor.is_meta and shapes_suffice())
    ):
        return registered
    return plain
