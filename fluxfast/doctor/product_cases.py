"""A step's products with adapters, forward and backward, and what they are given.

`linear_checks` runs each twice: by the implementation in the activations' dtype, and by the
reference in a wider one on the same values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluxfast.doctor.checks import Named, Random, widened
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.ops import row_quant
from fluxfast.ops.linear import augmented
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.pair import AnyGroup, LinearPair
from fluxfast.ops.linear.params import LinearParams, loras_of
from fluxfast.ops.parts import Parts
from fluxfast.quant import FORMATS, Format, QuantWeight

OUTLIER = 20.0
# of a double block's rows
PARTS = ("text", "image")


def shapes_of(scope: Scope) -> dict[str, tuple[int, list[int]]]:
    """The groups of linears in a block: the columns of x, and the rows of each linear's weight."""
    dim = scope.sizes.product_heads * scope.sizes.head_dim
    return {
        "q, k and v": (dim, [dim] * 3),
        "q, k, v and proj_mlp": (dim, [dim] * 3 + [4 * dim]),
        "ff.net.0": (dim, [4 * dim]),
        "ff.net.2": (4 * dim, [dim]),
        "proj_out": (5 * dim, [dim]),
    }


@functools.lru_cache(maxsize=4)
def _float_weight(rows: int, cols: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return Random(torch.device(device), dtype, seed=seed)(rows, cols, scale=cols**-0.5)


def make_group(
    scope: Scope, fmt: str, cols: int, outs: list[int], scale: float = 1.0, *, seed: int = 7
) -> list[LinearParams]:
    """Linears side by side in memory, as runs have them, each with an adapter and a bias."""
    dtype, randn = scope.torch_dtype, Random(scope.torch_device, scope.torch_dtype, seed=seed + 1)
    whole = _float_weight(sum(outs), cols, scope.device, dtype, seed)
    stored: list[Any] = list(whole.split(outs))
    if fmt != PLAIN:
        stored = _stored_side_by_side(FORMATS[fmt], whole, outs)
    adapter_dtype, linears = getattr(torch, scope.adapter_dtype), []
    for weight, rows in zip(stored, outs, strict=True):
        a, b = (
            randn(scope.rank, cols, scale=cols**-0.5),
            randn(rows, scope.rank, scale=scope.rank**-0.5),
        )
        adapter = Lora(a.to(adapter_dtype), b.to(adapter_dtype), scale)
        linears.append(LinearParams(weight, randn(rows), (adapter,)))
    return linears


def with_other_adapters(scope: Scope, linears: list[LinearParams]) -> list[LinearParams]:
    """The linears of q, k and v with LoKr, LoKr with weight decomposition, and DoRA."""
    randn, dtype = Random(scope.torch_device, scope.torch_dtype, seed=3), scope.adapter_dtype
    rows, cols = linears[0].weight.shape
    small = math.gcd(rows, cols, 8)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, scale=scale).to(getattr(torch, dtype))

    def lokr(magnitude: Tensor | None) -> Lokr:
        w1 = drawn(small, small, scale=small**-0.5)
        w2 = drawn(rows // small, cols // small, scale=(cols // small) ** -0.5)
        return Lokr((w1,), (w2,), 0.5, magnitude=magnitude)

    lengths = [drawn(rows).abs() + 0.5 for _ in range(2)]
    (lora,) = loras_of(linears[2])
    adapters: list[Adapter] = [lokr(None), lokr(lengths[0][:, None])]
    adapters.append(lora._replace(magnitude=lengths[1]))
    return [p._replace(adapters=(own,)) for p, own in zip(linears, adapters, strict=True)]


def _stored_side_by_side(format: Format, whole: Tensor, outs: list[int]) -> list[QuantWeight]:
    """Rows of the weight, quantised.

    Codes that products may read as they are stored lie one after the other.
    """
    if format.stored_codes is not None:
        parts = {name: part.split(outs) for name, part in format.quantize(whole).items()}
        each = [{name: pieces[i] for name, pieces in parts.items()} for i in range(len(outs))]
    else:
        each = [format.quantize(rows) for rows in whole.split(outs)]
    shapes = [(rows, whole.shape[1]) for rows in outs]
    return [QuantWeight(format, p, shape) for p, shape in zip(each, shapes, strict=True)]


def widened_linears(linears: list[LinearParams], dtype: torch.dtype) -> list[LinearParams]:
    return [
        p._replace(
            weight=widened(p.weight, dtype) if isinstance(p.weight, Tensor) else p.weight,
            bias=None if p.bias is None else widened(p.bias, dtype),
            adapters=tuple(
                a.with_tensors([widened(t, dtype) for t in a.tensors]) for a in p.adapters
            ),
        )
        for p in linears
    ]


def products(
    linears: list[LinearParams],
    x: Tensor,
    dy: Tensor,
    impl: str,
    *,
    room: bool = False,
    **options: Any,
) -> Named:
    """y, dx, and every adapter's gradients; each direction has its own group, as in a block.

    room: x and dy have room for adapters behind each row, as where our own ops write them.
    """
    first, second = (
        LinearGroup(linears, x.dtype, impl=impl, dgrad=dgrad, **options) for dgrad in (False, True)
    )
    y, s, dx, grads = _both_ways(first, second, x, dy, room)
    found = {"y": y, "dx": dx} | _named_grads(grads)
    if len(linears) > 3 and (fold := second.fold()) is not None:
        # a single block quantises the gradients of q, k and v apart from the MLP's
        cuts = [0, sum(lin.weight.shape[0] for lin in linears[:3]), dy.shape[1]]
        codes = [
            (
                start,
                row_quant.forward(dy[:, start:stop], second.compute, fold[start:stop], impl=impl),
            )
            for start, stop in pairwise(cuts)
        ]
        apart, _ = second.backward(dy, second.as_input(x), s, codes=codes)
        assert apart is not None
        found["dx of codes in parts"] = apart
    return found


def products_of_parts(
    txt: list[LinearParams],
    img: list[LinearParams],
    x: Tensor,
    dy: Tensor,
    rows: int,
    *,
    room: bool = False,
    **options: Any,
) -> Named:
    """As `products`, by Triton's kernels for both streams of a double block at once.

    The first `rows` rows of x and dy are the text's. What is found has the part in its name.
    """

    def pair(dgrad: bool) -> LinearPair:
        of_parts = (
            LinearGroup(linears, x.dtype, impl="triton", dgrad=dgrad, **options)
            for linears in (txt, img)
        )
        return LinearPair(next(of_parts), next(of_parts), Parts(rows, 1))

    y, _, dx, grads = _both_ways(pair(False), pair(True), x, dy, room)
    found: Named = {}
    for part, of_part, own in zip(PARTS, (slice(rows), slice(rows, None)), grads, strict=True):
        named = {"y": y[of_part], "dx": dx[of_part]} | _named_grads(own)
        found |= {f"{part} {name}": tensor for name, tensor in named.items()}
    return found


def _both_ways(
    first: AnyGroup, second: AnyGroup, x: Tensor, dy: Tensor, room: bool
) -> tuple[Tensor, Tensor | None, Tensor, Any]:
    """y and s by the first group, dx and the adapters' gradients by the second."""
    x_place = first.new_input(len(x)) if room else None
    dy_place = second.new_output(len(dy)) if room else None
    y, s = first.forward(first.as_input(x if x_place is None else x_place.copy_(x)))
    own_dy = dy if dy_place is None else dy_place.copy_(dy)
    dx, grads = second.backward(own_dy, second.as_input(x), s)
    assert dx is not None
    return y, second.recall(s), dx, grads


def with_room(linears: list[LinearParams]) -> list[LinearParams]:
    """The linears with weights that have room for adapters; what is decoded has it by itself."""
    weights = [p.weight for p in linears if isinstance(p.weight, Tensor)]
    if len(weights) < len(linears):
        return linears
    rank = sum(len(lora.a) for p in linears for lora in loras_of(p))
    places = augmented.make_room(weights, rank)
    return [p._replace(weight=place) for p, place in zip(linears, places, strict=True)]


def _named_grads(grads: list[tuple[Tensor, ...]]) -> Named:
    """dA and dB of a LoRA, or of a LoKr's two factors, and dC of a magnitude."""
    return {
        f"d{name} {i}": grad
        for i, own in enumerate(grads)
        for name, grad in zip("ABC", own, strict=False)
    }


def inputs_of(
    scope: Scope, tokens: int, cols: int, rows: int, *, outliers: int = 0
) -> tuple[Tensor, Tensor]:
    randn = Random(scope.torch_device, scope.torch_dtype, seed=tokens)
    x, dy = randn(tokens, cols), randn(tokens, rows)
    if outliers:
        # of different sizes, so that no choice among them is arbitrary
        sizes = OUTLIER * torch.arange(1, outliers + 1, device=x.device)
        x[:, 3 :: cols // outliers][:, :outliers] *= sizes.to(x.dtype)
    return x, dy


def embedders(scope: Scope) -> Iterator[tuple[str, list[LinearParams], int, int]]:
    """For each: its name in the check, the linear as a group, its columns, its rows."""
    dim = shapes_of(scope)["q, k and v"][0]
    for cols, rows in ((64, dim), (dim, 64)):
        adapted = make_group(scope, PLAIN, cols, [rows], scope.lora_scale)
        yield f"{cols} to {rows}, adapted", adapted, cols, rows
        yield f"{cols} to {rows}", [lin._replace(adapters=()) for lin in adapted], cols, rows
