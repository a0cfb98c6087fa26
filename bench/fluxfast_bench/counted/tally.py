"""What a step launches and moves, counted op by op on meta tensors (see `meta_step`).

An op's bytes are those of its tensors, each once: inputs read, outputs written, a tensor changed in
place both; what is broadcast counts as much as there is of it in memory. Views and empty tensors
cost nothing. What a kernel reads again because its caches are too small is not in the figure: it is
the least that the op as it is dispatched can move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxfast_bench.counted.meta_step import as_on_gpu

Category = Literal["memory", "gemm", "gemv", "attention"]
CATEGORIES: tuple[Category, ...] = ("memory", "gemm", "gemv", "attention")

# a product whose narrowest dimension is below this moves memory longer than it computes, on every
# GPU since Ampere: what an adapter of a common rank is
NARROW = 128

_GEMMS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_int_mm", "_scaled_mm"}
_ATTENTION = {
    f"_scaled_dot_product_{kind}_attention{direction}"
    for kind in ("flash", "efficient", "cudnn", "fused")
    for direction in ("", "_backward")
}
_FREE = {
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "lift_fresh",
    ),
    *("_unsafe_view", "_reshape_alias", "set_", "resize_"),
}
# in place, but their first argument is not read
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}
# a GPU's kernels of an op, where there is more than one
_KERNELS = {"slice_backward": 2, "select_backward": 2}


def touched_bytes(tensor: Tensor) -> int:
    """The memory that a tensor's elements take up, each place once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            elements *= size
    return elements * tensor.element_size()


def _gemm_category(inputs: list[Tensor], outputs: list[Tensor], batch: int) -> Category:
    # the last two inputs are the matrices, whatever is added comes before them
    left, right = (t for t in inputs if t.ndim >= 2) if len(inputs) == 2 else inputs[-2:]
    narrowest = min(*left.shape[-2:], right.shape[-1])
    if narrowest <= batch:
        return "gemv"
    return "memory" if narrowest < NARROW else "gemm"


@dataclass
class Tally:
    """Launches and bytes, by category, and within it by op."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    # (category, op): launches, and bytes
    op_launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    op_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, category: str, op: str, launches: int, moved: int) -> None:
        self.launches[category] += launches
        self.bytes[category] += moved
        self.op_launches[category, op] += launches
        self.op_bytes[category, op] += moved

    @property
    def total_launches(self) -> int:
        return sum(self.launches.values())


class Counting(TorchDispatchMode):
    """Counts into `tally` what is dispatched while it is on.

    `on_launch` is what `meta_step.as_on_gpu` should call.
    """

    def __init__(self, batch: int = 1) -> None:
        super().__init__()
        self.tally, self.batch = Tally(), batch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if not (func.is_view or name in _FREE):
            self._count(func, name, args, kwargs, out)
        return out

    def _count(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        inputs: list[Tensor] = []
        moved = 0
        for argument, value in zip(func._schema.arguments, args, strict=False):
            tensors = _tensors(value)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not (written and name in _OVERWRITING):
                inputs += tensors
            if written:
                moved += sum(map(touched_bytes, tensors))
        # by name: out= is written, everything else read
        for argument in func._schema.arguments:
            tensors = _tensors(kwargs.get(argument.name))
            if argument.alias_info is not None and argument.alias_info.is_write:
                moved += sum(map(touched_bytes, tensors))
            else:
                inputs += tensors
        new = [] if any(r.alias_info is not None for r in func._schema.returns) else _tensors(out)
        moved += sum(map(touched_bytes, [*_distinct(inputs), *new]))
        if name == "slice_backward":
            # zeros for all of it, then the gradient over a part
            moved += touched_bytes(inputs[0])
        category: Category = "memory"
        if name in _ATTENTION:
            category = "attention"
        elif name in _GEMMS:
            category = _gemm_category(inputs, new, self.batch)
        self.tally.add(category, name, _KERNELS.get(name, 1), moved)

    def on_launch(self, kernel: Any, args: tuple[Any, ...], numbers: Any) -> None:
        """A Triton kernel's tensors, each read or written once."""
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        moved = sum(map(touched_bytes, _distinct(arg for arg in args if isinstance(arg, Tensor))))
        category: Category = "memory"
        if name == "matmul_kernel":
            # its first argument is x [rows, columns]
            category = "gemv" if args[0].shape[0] <= self.batch else "gemm"
        self.tally.add(category, name, 1, moved)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without what is the same view of the same memory."""
    seen = {}
    for t in tensors:
        seen[t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()] = t
    return list(seen.values())


def counted(run: Callable[[], object], batch: int = 1) -> Tally:
    """What `run()` launches and moves."""
    counting = Counting(batch)
    with as_on_gpu(counting.on_launch), counting:
        run()
    return counting.tally
