"""Products with adapters, forward and backward: every format of the base, every type of product.

A product is compared with the same product of the same codes in a wider type, so that what a
format or 8 bits round away is no error. `format_checks` checks the formats themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluxfast.doctor.checks import (
    Check,
    Finding,
    Named,
    Part,
    Random,
    Rate,
    Tolerance,
    compare,
    of_products,
    poisoned_memory,
    reference_dtype,
    widened,
)
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.doctor.ways import WAY_OUT, obstacle_of, ways
from fluxfast.ops import dispatch, row_quant, verdicts
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.group import LinearGroup, LinearParams, loras_of
from fluxfast.quant import FORMATS, Format, QuantWeight

OUTLIER = 20.0


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


def _groups(scope: Scope, fmt: str) -> list[str]:
    """The groups to check over a format.

    In an exhaustive scope plain weights have them all, and the formats the shapes that launch
    something else.
    """
    groups = list(shapes_of(scope))
    return groups if fmt == PLAIN or not scope.exhaustive else [groups[0], groups[-1]]


@functools.lru_cache(maxsize=2)
def _float_weight(rows: int, cols: int, device: str, dtype: torch.dtype) -> Tensor:
    return Random(torch.device(device), dtype, seed=7)(rows, cols, scale=cols**-0.5)


def make_group(
    scope: Scope, fmt: str, cols: int, outs: list[int], scale: float = 1.0
) -> list[LinearParams]:
    """Linears side by side in memory, as runs have them, each with an adapter and a bias."""
    dtype, randn = scope.torch_dtype, Random(scope.torch_device, scope.torch_dtype, seed=8)
    whole = _float_weight(sum(outs), cols, scope.device, dtype)
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


def _widened(linears: list[LinearParams], dtype: torch.dtype) -> list[LinearParams]:
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


def _products(
    linears: list[LinearParams], x: Tensor, dy: Tensor, impl: str, **options: Any
) -> Named:
    """y, dx, and every adapter's gradients; each direction has its own group, as in a block."""
    first, second = (LinearGroup(linears, x.dtype, impl=impl, **options) for _ in range(2))
    y, s = first.forward(first.as_input(x))
    dx, grads = second.backward(dy, second.as_input(x), s)
    assert dx is not None
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


def _named_grads(grads: list[tuple[Tensor, ...]]) -> Named:
    return {
        f"d{name} {i}": grad
        for i, pair in enumerate(grads)
        for name, grad in zip("AB", pair, strict=True)
    }


def _inputs(
    scope: Scope, tokens: int, cols: int, rows: int, *, outliers: int = 0
) -> tuple[Tensor, Tensor]:
    randn = Random(scope.torch_device, scope.torch_dtype, seed=tokens)
    x, dy = randn(tokens, cols), randn(tokens, rows)
    if outliers:
        # of different sizes, so that no choice among them is arbitrary
        sizes = OUTLIER * torch.arange(1, outliers + 1, device=x.device)
        x[:, 3 :: cols // outliers][:, :outliers] *= sizes.to(x.dtype)
    return x, dy


def _check_product(
    scope: Scope, impl: str, fmt: str, compute: str, group: str, outliers: int
) -> Finding:
    cols, outs = shapes_of(scope)[group]
    linears, parts = make_group(scope, fmt, cols, outs, scope.lora_scale), []
    options: dict[str, Any] = {"compute": compute, "outliers": outliers}
    wide, tolerance = (
        reference_dtype(scope.torch_dtype),
        of_products(scope.torch_dtype, getattr(torch, scope.adapter_dtype)),
    )
    with torch.no_grad():
        for tokens in scope.sizes.products:
            x, dy = _inputs(scope, tokens, cols, sum(outs), outliers=outliers)
            with poisoned_memory():
                actual = _products(linears, x, dy, impl, **options)
            expected = _products(
                _widened(linears, wide), widened(x, wide), widened(dy, wide), "ref", **options
            )
            found = compare(actual, expected, tolerance)
            parts += [part._replace(name=f"{part.name}, {tokens} tokens") for part in found]
    return Finding(tuple(parts))


def _check_embedders(scope: Scope, impl: str) -> Finding:
    """Into the blocks' width and out of it, with and without adapters, as presets differ."""
    wide, tolerance = (
        reference_dtype(scope.torch_dtype),
        of_products(scope.torch_dtype, getattr(torch, scope.adapter_dtype)),
    )
    parts, tokens = [], scope.sizes.products[-1]
    with torch.no_grad():
        for said, linears, cols, rows in embedders(scope):
            x, dy = _inputs(scope, tokens, cols, rows)
            with poisoned_memory():
                actual = _products(linears, x, dy, impl)
            expected = _products(
                _widened(linears, wide), widened(x, wide), widened(dy, wide), "ref"
            )
            found = compare(actual, expected, tolerance)
            parts += [part._replace(name=f"{part.name}, {said}") for part in found]
    return Finding(tuple(parts))


def embedders(scope: Scope) -> Iterator[tuple[str, list[LinearParams], int, int]]:
    """For each: its name in the check, the linear as a group, its columns, its rows."""
    dim = shapes_of(scope)["q, k and v"][0]
    for cols, rows in ((64, dim), (dim, 64)):
        adapted = make_group(scope, PLAIN, cols, [rows], scope.lora_scale)
        yield f"{cols} to {rows}, adapted", adapted, cols, rows
        yield f"{cols} to {rows}", [lin._replace(adapters=()) for lin in adapted], cols, rows


def _time_product(
    scope: Scope, impl: str, fmt: str, compute: str, group: str, outliers: int
) -> Rate:
    cols, outs = shapes_of(scope)[group]
    linears = make_group(scope, fmt, cols, outs, scope.lora_scale)
    x, dy = _inputs(scope, scope.sizes.timed, cols, sum(outs), outliers=outliers)
    with torch.no_grad():
        run = functools.partial(_products, linears, x, dy, impl, compute=compute, outliers=outliers)
        return Rate(4 * len(x) * cols * sum(outs) / seconds_of(run, scope.torch_device), "op/s")


def _check_dropout(scope: Scope, impl: str, compute: str) -> Finding:
    """Adapters on dropped inputs, beside the formula with the mask that the implementation drew."""
    cols, outs = shapes_of(scope)["q, k and v"]
    p, seed, tokens = max(scope.dropout, 0.1), 1234, scope.sizes.products[-1]
    # here the adapters' scale is not 1, which the other checks may leave at 1
    plain = make_group(scope, PLAIN, cols, outs, 0.5)
    dropped = [
        lin._replace(adapters=tuple(lora._replace(dropout=p) for lora in loras_of(lin)))
        for lin in plain
    ]
    x, dy = _inputs(scope, tokens, cols, sum(outs))
    wide, tolerance = (
        reference_dtype(scope.torch_dtype),
        of_products(scope.torch_dtype, getattr(torch, scope.adapter_dtype)),
    )
    with torch.no_grad():
        actual = _products(dropped, x, dy, impl, compute=compute, dropout_seed=seed)
        # the mask that forward and backward draw for this seed
        group = LinearGroup(dropped, x.dtype, impl=impl, dropout_seed=seed)
        mask = widened(group.dropped(torch.ones_like(x), p), wide)
        linears, wx, wdy = _widened(plain, wide), widened(x, wide), widened(dy, wide)
        bare = [lin._replace(adapters=()) for lin in linears]
        expected, column = _products(bare, wx, wdy, "ref", compute=compute), 0
        y = expected["y"].split(outs, dim=1)
        for i, lin in enumerate(linears):
            a, b, scale, _ = loras_of(lin)[0]
            d = wdy[:, column : column + outs[i]]
            column += outs[i]
            s, ds = scale * (wx * mask) @ a.T, scale * d @ b
            y[i].add_(s @ b.T)
            expected["dx"].add_(mask * (ds @ a))
            expected |= {f"dA {i}": ds.T @ (wx * mask), f"dB {i}": d.T @ s}
        found = compare(actual, expected, tolerance)
        # the standard deviation of the kept share, a mean of so many draws
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        share = abs(float((mask > 0).double().mean()) - (1 - p)) / deviation
    found.append(
        Part(
            "the share that is kept, in standard deviations",
            share,
            Tolerance(6, "one draw in 10^9 is further off"),
        )
    )
    return Finding(tuple(found))


def _with_outliers(scope: Scope, compute: str, fmt: str) -> list[int]:
    """How many channels to leave out of the codes; one check for each number."""
    if compute == "same":
        return [0]
    if scope.exhaustive:
        # leaving channels out works the same whatever format the codes come from
        return [0, scope.outliers] if fmt == PLAIN else [0]
    return [scope.outliers]


def linear_checks(scope: Scope) -> Iterator[Check]:
    """Products in each type, over each format."""
    for impl, said, isa in ways(scope):
        # on a CPU BLAS makes the products; the native module's part, adapters' gradients and codes,
        # is checked on the instruction set in use only
        if isa is not None and isa != dispatch.native.cpu_isa():
            continue
        obstacle = obstacle_of(impl, scope)
        for compute in scope.computes:
            what, way = ("lora_linear", impl) if compute == "same" else (verdicts.COMPUTE, compute)
            runs = "" if compute == "same" else f" in {compute}"
            outs = {
                True: WAY_OUT[impl],
                False: f'`auto` takes "compute_precision": "same" in place of {compute}',
            }
            common: dict[str, Any] = {
                "what": what,
                "way": way,
                "obstacle": obstacle,
                "way_out": outs[compute == "same"],
            }
            for fmt in scope.formats:
                for group in _groups(scope, fmt):
                    for outliers in _with_outliers(scope, compute, fmt):
                        arguments = (scope, impl, fmt, compute, group, outliers)
                        apart = f", {outliers} channels apart" if outliers else ""
                        yield Check(
                            name=f"{group}, {fmt} weights{runs}{apart} ({said})",
                            run=functools.partial(_check_product, *arguments),
                            time=functools.partial(_time_product, *arguments)
                            if scope.sizes.timed
                            else None,
                            short=True,
                            **common,
                        )
            if compute == "same":
                run = functools.partial(_check_embedders, scope, impl)
                yield Check(name=f"embedders ({said})", run=run, short=True, **common)
            if scope.dropout:
                run = functools.partial(_check_dropout, scope, impl, compute)
                yield Check(
                    name=f"adapters with dropout{runs} ({said})", run=run, short=True, **common
                )
