"""The wide products of a step: recorded on meta tensors, and run again on any device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast_kernels.matmul import listening, make_segments, matmul


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def random(self, device: torch.device) -> Tensor:
        """One with random values: products of zeros run faster."""
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        if device.type == "meta":
            return made
        if self.dtype == torch.int8:
            return made.random_(-127, 128)
        return made.copy_(torch.randn(self.shape, device=device))


@dataclass(frozen=True)
class Product:
    """One call of the kernels' `matmul`. Equal calls do the same work.

    Tensors are kept by argument, without their values; segments as sizes and ranks of the linears.
    """

    tensors: tuple[tuple[str, Like], ...]
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None
    others: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Product:
        given = {name: value for name, value in arguments.items() if value is not None}
        segments = given.pop("segments", None)
        tensors = {
            name: Like.of(value) for name, value in given.items() if isinstance(value, Tensor)
        }
        return cls(
            tuple(tensors.items()),
            None if segments is None else (segments.outs, segments.ranks),
            tuple((name, value) for name, value in given.items() if name not in tensors),
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K."""
        of = dict(self.tensors)
        return of["x"].shape[0], *of["w"].shape  # type: ignore[return-value]

    @property
    def flops(self) -> float:
        """Of the wide product; what the epilogue adds is a hundredth."""
        m, n, k = self.size
        return 2.0 * m * n * k

    @property
    def kind(self) -> str:
        """The row of MATMUL that it has: "int8", "half_t" and so on."""
        of = dict(self.tensors)
        kind = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float32: "fp32"}.get(
            of["x"].dtype, "half"
        )
        return kind + ("" if of["w"].strides[1] == 1 else "_t")

    def __str__(self) -> str:
        told = [name for name, _ in self.tensors if name not in ("x", "w", "x_scale", "w_scale")]
        told += ["segments"] if self.segments else []
        told += [name for name, value in self.others if value is True]
        return " ".join([self.kind, "x".join(map(str, self.size)), *sorted(told)])

    def on(self, device: torch.device) -> Callable[[Mapping[str, int] | None], Tensor]:
        """The call on fresh tensors, as a function of its launch numbers (None: the table's)."""
        arguments: dict[str, Any] = {
            name: like.random(device) for name, like in self.tensors
        } | dict(self.others)
        if self.segments is not None:
            arguments["segments"] = make_segments(*self.segments, device)
        return lambda numbers: matmul(**arguments, numbers=numbers)


@contextlib.contextmanager
def counted() -> Iterator[Counter[Product]]:
    """The products that run in here, on whatever device, and how often each does."""
    found: Counter[Product] = Counter()
    with listening(lambda arguments: found.update([Product.of(arguments)])):
        yield found
