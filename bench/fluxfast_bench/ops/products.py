"""The wide products of a step: recorded on meta tensors, and run again on any device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast_bench.counted.meta_step import (
    as_on_gpu,
    fluxfast_model,
    forward_backward,
    inputs_of,
)
from fluxfast_bench.shapes import Shape
from fluxfast_kernels.matmul import Second, listening, matmul, product_kind
from fluxfast_kernels.product_tile import make_segments

# (storage, compute) as `fluxfast_model` takes them
PRECISIONS = {"int8": ("int8", "int8"), "bf16": (None, "same")}


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def random(self, device: torch.device) -> Tensor:
        """One with random values: products of zeros run faster."""
        made = self.empty(device)
        if device.type == "meta":
            return made
        if self.dtype == torch.int8:
            return made.random_(-127, 128)
        return made.copy_(torch.randn(self.shape, device=device))


@dataclass(frozen=True)
class Product:
    """One call of the kernels' `matmul`. Equal calls do the same work.

    Tensors are kept by argument, without their values; segments as sizes and ranks of the linears;
    of a second part the tensors, and the rows of the first.
    """

    tensors: tuple[tuple[str, Like], ...]
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None
    second: tuple[tuple[str, Like], ...]
    first_rows: int
    others: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Product:
        given = {name: value for name, value in arguments.items() if value is not None}
        segments, second = given.pop("segments", None), given.pop("second", None)
        tensors = {
            name: Like.of(value) for name, value in given.items() if isinstance(value, Tensor)
        }
        return cls(
            tuple(tensors.items()),
            None if segments is None else (segments.outs, segments.ranks),
            tuple(
                (name, Like.of(value))
                for name, value in (() if second is None else second._asdict().items())
                if isinstance(value, Tensor)
            ),
            given["x"].shape[0] if second is None else second.rows,
            tuple((name, value) for name, value in given.items() if name not in tensors),
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K."""
        of = dict(self.tensors)
        return of["x"].shape[0], *of["w"].shape  # type: ignore[return-value]

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each part."""
        m = self.size[0]
        return (self.first_rows, m - self.first_rows) if self.second else (m,)

    @property
    def cols(self) -> tuple[int, ...]:
        """Of each linear."""
        return (self.size[1],) if self.segments is None else self.segments[0]

    @property
    def flops(self) -> float:
        """Of the wide product; what the epilogue adds is a hundredth."""
        m, n, k = self.size
        return 2.0 * m * n * k

    def kind(self, device: torch.device) -> str:
        """The kind of TILES that it is on a device: "int8_persistent", "half_t" and so on."""
        of, second = dict(self.tensors), dict(self.second)
        out = of["out"].dtype if "out" in of else dict(self.others).get("out_dtype")
        return product_kind(
            of["x"].empty(device),
            of["w"].empty(device),
            Second(self.first_rows, second["w"].empty(device)) if second else None,
            out or of["x"].dtype,
        )

    def __str__(self) -> str:
        of, (_, n, k) = dict(self.tensors), self.size
        types = " ".join(dict.fromkeys(str(of[name].dtype).split(".")[1] for name in "xw"))
        told = [name for name, _ in self.tensors if name not in ("x", "w", "x_scale", "w_scale")]
        told += ["segments"] if self.segments else []
        told += [name for name, value in self.others if value is True]
        told += [] if of["w"].strides[1] == 1 else ["transposed"]
        rows = "+".join(map(str, self.rows))
        return " ".join([types, f"{rows}x{n}x{k}", *sorted(told)])

    def on(self, device: torch.device) -> Callable[[Mapping[str, int] | None], Tensor]:
        """The call on fresh tensors, as a function of its launch numbers (None: the table's)."""
        arguments: dict[str, Any] = {
            name: like.random(device) for name, like in self.tensors
        } | dict(self.others)
        if self.segments is not None:
            arguments["segments"] = make_segments(*self.segments, device)
        if self.second:
            tensors = {name: like.random(device) for name, like in self.second}
            arguments["second"] = Second(self.first_rows, **tensors)
        return lambda numbers: matmul(**arguments, numbers=numbers)


@contextlib.contextmanager
def counted() -> Iterator[Counter[Product]]:
    """The products that run in here, on whatever device, and how often each does."""
    found: Counter[Product] = Counter()
    with listening(lambda arguments: found.update([Product.of(arguments)])):
        yield found


def products_of(shape: Shape, precision: str) -> dict[Product, int]:
    """The wide products of a checkpointed step, the most expensive first, with their counts."""
    storage, compute = PRECISIONS[precision]
    model = fluxfast_model(shape, adapters=torch.bfloat16, format=storage, compute=compute)
    inputs = inputs_of(shape)
    with counted() as calls, as_on_gpu(lambda *_: None):
        forward_backward(model, inputs)
    blocks = min(shape.config["num_layers"], shape.config["num_single_layers"])
    # those outside the blocks come once
    found = {p: n for p, n in calls.items() if n >= max(blocks - 1, 1)}
    return dict(sorted(found.items(), key=lambda item: -item[0].flops * item[1]))
