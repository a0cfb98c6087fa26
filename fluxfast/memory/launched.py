"""What a run launches, moves and multiplies, told op by op while it runs on meta tensors.

An op's bytes are those of its tensors, each once: inputs read, outputs written, a tensor changed in
place both; what is broadcast counts as much as there is of it in memory. Views and empty tensors
cost nothing. What a kernel reads again because its caches are too small is not in the figure: it is
the least that the op as it is dispatched can move.

Inside `ops.device.pretend`, our kernels are heard of launch by launch where `on_launch` is given to
it. Where it is not (a machine without Triton), our ops are heard of call by call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxfast_kernels.launch import arch_key, wide_engine
from fluxfast_kernels.tiles import TILES

Category = Literal["memory", "gemm", "gemv", "attention"]
CATEGORIES: tuple[Category, ...] = ("memory", "gemm", "gemv", "attention")

# a product whose narrowest dimension is below this moves memory longer than it computes, on every
# GPU since Ampere: what an adapter of a common rank is
NARROW = 128


class Product(NamedTuple):
    """A wide product x [Σ rows, k] times w [Σ cols, k] in one launch.

    kind: "library" for torch's own GEMM; else a key of `fluxfast_kernels.tiles.TILES`.
    rows: of the parts of x that meet weights of their own. cols: of the linears side by side.
    """

    kind: str
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    k: int

    @property
    def flops(self) -> int:
        return 2 * sum(self.rows) * sum(self.cols) * self.k


class Launched(NamedTuple):
    """What one op, or one launch of a kernel, does.

    Attributes:
        category: what its time depends on; `op` is its name.
        launches: the GPU's kernels that it is.
        nbytes: read and written.
        flops: of attention, and of an adapter's thin products.
        product: of a wide product, its sizes.
    """

    category: Category
    op: str
    launches: int
    nbytes: int
    flops: int = 0
    product: Product | None = None


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


class Watching(TorchDispatchMode):
    """Tells `told` of all that is dispatched while it is on.

    `on_launch` is for `pretend`, and `on_product` for `fluxfast_kernels.matmul.listening`: without
    the second, our kernels' products are told without their sizes. Where no kernel is asked,
    `on_op` is for `ops.registration.listening`. batch: samples, by which modulation's products are
    told from others.
    """

    def __init__(self, told: Callable[[Launched], object], batch: int = 1) -> None:
        super().__init__()
        self._told, self._batch = told, batch
        self._product: Product | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if not (func.is_view or name in _FREE) and _on_gpu((args, kwargs, out)):
            self._told(self._dispatched(func, name, args, kwargs, out))
        return out

    def _dispatched(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Launched:
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
        category, flops, product = self._work(name, args, inputs, new)
        return Launched(category, name, _KERNELS.get(name, 1), moved, flops, product)

    def _work(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
    ) -> tuple[Category, int, Product | None]:
        """What an op computes: its category, FLOPs, and a wide product's sizes."""
        if name in _ATTENTION:
            # q, k and v come first, in backward after the gradient
            query, key = inputs[1:3] if name.endswith("_backward") else inputs[:2]
            return "attention", 4 * query.numel() * key.shape[-2], None
        if name not in _GEMMS:
            return "memory", 0, None
        # the last two inputs are the matrices, whatever is added comes before them
        pair = [t for t in inputs if t.ndim >= 2] if len(inputs) == 2 else inputs[-2:]
        (m, k), n = pair[0].shape[-2:], pair[1].shape[-1]
        narrowest = min(m, k, n)
        if narrowest <= self._batch:
            return "gemv", 0, None
        # an adapter's rank is a dimension of W; or the rows of a gradient, whose first factor is
        # transposed, unlike a few tokens
        few_tokens = m < NARROW and pair[0].stride(-1) == 1
        if min(k, n) < NARROW or (m < NARROW and not few_tokens):
            return "memory", _thin_flops([*pair, *outputs]), None
        product = Product("library", (math.prod(pair[0].shape[:-1]),), (n,), k)
        return "memory" if few_tokens else "gemm", 0, product

    def on_launch(self, kernel: Any, args: tuple[Any, ...], numbers: Any) -> None:
        """A Triton kernel's tensors, each read or written once."""
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        tensors = _distinct(arg for arg in args if isinstance(arg, Tensor))
        moved = sum(map(touched_bytes, tensors))
        flops = _thin_flops(tensors) if name.startswith(_THIN) else 0
        if name == "kron_kernel":
            a, u, v, *_, du = args[:10]
            flops = _kron_flops(len(a), u, v, du)
        elif name == "kron_outer_kernel":
            dy, _, u, g = args[:4]
            flops = _kron_flops(len(dy), u.T, g.T, None)
        if name in _RESULTS and numbers["ACCUMULATE"]:
            moved += sum(map(touched_bytes, _tensors(args[_RESULTS[name]])))
        category: Category = "memory"
        if name in ("matmul_kernel", "persistent_matmul_kernel"):
            # its first argument is x [rows, columns]
            category = "gemv" if args[0].shape[0] <= self._batch else "gemm"
        product, self._product = (self._product, None) if category == "gemm" else (None, None)
        self._told(Launched(category, name, 1, moved, flops, product))

    def on_op(self, name: str, arguments: Mapping[str, Any], made: list[Tensor]) -> None:
        """One of our ops, as one launch: its tensors, each read or written once."""
        tensors = _distinct([*_tensors(arguments), *made])
        if not _on_gpu(tensors):
            return
        moved = sum(map(touched_bytes, tensors))
        flops = _thin_flops(tensors) if name.startswith(_THIN) else 0
        if name in _KRON:
            w1, w2 = arguments["w1"], arguments["w2"]
            flops = _KRON[name](len(arguments["x"]), w1, w2)
        if name in _OP_RESULTS and arguments.get("accumulate", True):
            moved += sum(map(touched_bytes, _tensors(arguments[_OP_RESULTS[name]])))
        product = _WIDE[name](arguments) if name in _WIDE else None
        category: Category = "memory" if product is None else "gemm"
        self._told(Launched(category, name, 1, moved, flops, product))

    def on_product(self, arguments: Mapping[str, Any]) -> None:
        """The sizes of the product that is launched next."""
        x, w, segments, second = (arguments[name] for name in ("x", "w", "segments", "second"))
        cols = (w.shape[0],) if segments is None else tuple(segments.outs)
        kind = _kind(x, w.stride(1) == 1)
        self._product = Product(kind, _rows(x, second), cols, x.shape[1])


def _kind(x: Tensor, k_major: bool) -> str:
    """The kind of TILES for an x of values or of codes; k_major: w's contraction is contiguous."""
    kinds = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float32: "fp32"}
    kind = kinds.get(x.dtype, "half")
    if not k_major:
        return f"{kind}_t"
    persistent = f"{kind}_persistent"
    return persistent if arch_key(x.device) in TILES.get(persistent, ()) else kind


def _thin_flops(tensors: Iterable[Tensor]) -> int:
    """Of a product of activations with an adapter's matrix: of the largest tensor by the rank."""
    matrices = [t for t in tensors if t.ndim >= 2]
    return 2 * max(t.numel() for t in matrices) * min(min(t.shape[-2:]) for t in matrices)


def _kron_flops(rows: int, u: Tensor, v: Tensor, du: Tensor | None) -> int:
    """Of a [P · R] times (u [S, P] ⊗ v [Q, R]) a row: over R, then over P; and of du."""
    (s, p), (q, r) = u.shape, v.shape
    return 2 * rows * p * q * (r + s + (0 if du is None else s))


def _kron_backward_flops(rows: int, w1: Tensor, w2: Tensor) -> int:
    """Of LoKr's gradients: those of x and w1, and that of w2."""
    return _kron_flops(rows, w1.T, w2.T, w1) + _kron_flops(rows, w1.T, w2, None)


def _rows(x: Tensor, second: Any) -> tuple[int, ...]:
    """The rows of each part of x; second: what the second part meets, if there is one."""
    return (len(x),) if second is None else (second.rows, len(x) - second.rows)


def _wide_op(arguments: Mapping[str, Any]) -> Product:
    """Of a group's op where no kernel is asked: `products_triton.wide`."""
    x, weights, w_scales, second = (arguments[n] for n in ("x", "weights", "w_scales", "second"))
    kind, cols = _engine_kind(x, weights[0], w_scales, True), tuple(w.shape[0] for w in weights)
    return Product(kind, _rows(x, second), cols, x.shape[1])


def _wide_dgrad_op(arguments: Mapping[str, Any]) -> Product:
    """Of a group's gradient where no kernel is asked: `products_triton.wide_dgrad`."""
    dy, (w, *_), w_scales, second = (arguments[n] for n in ("dy", "weights", "w_scales", "second"))
    kind = _engine_kind(dy, w, w_scales, w.stride(0) == 1)
    return Product(kind, _rows(dy, second), (w.shape[1],), dy.shape[1])


def _engine_kind(x: Tensor, w: Tensor, w_scales: list[Tensor], k_major: bool) -> str:
    plain = not w_scales and x.dtype == w.dtype
    if plain and wide_engine("float", x.shape[0], x.device) == "library":
        return "library"
    return _kind(x, k_major)


_WIDE: dict[str, Callable[[Mapping[str, Any]], Product]] = {
    "linear_fwd": _wide_op,
    "linear_dgrad": _wide_dgrad_op,
}
# of LoKr's ops, by their rows and factors
_KRON: dict[str, Callable[[int, Tensor, Tensor], int]] = {
    "linear_kron": lambda rows, w1, w2: _kron_flops(rows, w1, w2, None),
    "linear_kron_grads": _kron_backward_flops,
}
# what may be added to, and is then read as well as written: the place among a kernel's arguments,
# and the name among an op's, of which LoKr's forward always adds
_RESULTS = {"kron_kernel": 3, "matmul_kernel": 2, "persistent_matmul_kernel": 2}
_OP_RESULTS = {"linear_kron": "y", "linear_kron_grads": "dx", "linear_dgrad": "dx"}
# the adapters' kernels, and their ops where no kernel is asked
_THIN = ("lora_", "linear_down", "linear_ds", "linear_da", "linear_db")


def _on_gpu(value: Any) -> bool:
    """Whether an op works on the GPU's tensors: a table that is made on the CPU once is not its."""
    return any(tensor.is_meta for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without what is the same view of the same memory."""
    seen = {}
    for t in tensors:
        seen[t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()] = t
    return list(seen.values())
