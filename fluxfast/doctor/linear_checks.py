"""Products with adapters, forward and backward: every format of the base, every type of product.

A product is compared with the same product of the same codes in a wider type, so that what a
format or 8 bits round away is no error. `format_checks` checks the formats themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxfast.doctor.checks import (
    Check,
    Finding,
    Named,
    Part,
    Rate,
    Tolerance,
    compare,
    of_products,
    poisoned_memory,
    reference_dtype,
    widened,
)
from fluxfast.doctor.product_cases import (
    PARTS,
    embedders,
    inputs_of,
    make_group,
    products,
    products_of_parts,
    shapes_of,
    widened_linears,
    with_other_adapters,
    with_room,
)
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.doctor.ways import WAY_OUT, obstacle_of, ways
from fluxfast.model.room import wants_room
from fluxfast.ops import dispatch, verdicts
from fluxfast.ops.device import sum_loss
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.params import loras_of

# the groups that a double block has for each of its streams
PAIRED = ("q, k and v", "ff.net.0", "ff.net.2")


def _groups(scope: Scope, fmt: str) -> list[str]:
    """The groups to check over a format.

    In an exhaustive scope plain weights have them all, and the formats the shapes that launch
    something else.
    """
    groups = list(shapes_of(scope))
    return groups if fmt == PLAIN or not scope.exhaustive else [groups[0], groups[-1]]


def _tolerance(scope: Scope, compute: str) -> Callable[[str], Tolerance]:
    adapters = getattr(torch, scope.adapter_dtype)
    return of_products(scope.torch_dtype, adapters, sum_loss(compute, scope.torch_device))


def _beside_reference(
    scope: Scope,
    compute: str,
    x_dy: Sequence[tuple[Tensor, Tensor]],
    actual: Callable[[Tensor, Tensor, bool], Named],
    expected: Callable[[Tensor, Tensor], Named],
) -> Finding:
    """Products on each x and dy, beside the reference's on the same in a wider type.

    The third argument of `actual` says whether x and dy have room for adapters; it is asked for
    that only where runs have such room.
    """
    wide, tolerance = reference_dtype(scope.torch_dtype), _tolerance(scope, compute)
    both, parts = compute == "same" and wants_room(scope.torch_device), []
    with torch.no_grad():
        for x, dy in x_dy:
            with poisoned_memory():
                found_by = {"": actual(x, dy, False)}
                if both:
                    found_by[", with room"] = actual(x, dy, True)
            wanted = expected(widened(x, wide), widened(dy, wide))
            for how, made in found_by.items():
                name = f"{len(x)} tokens{how}"
                parts += [
                    part._replace(name=f"{part.name}, {name}")
                    for part in compare(made, wanted, tolerance)
                ]
    return Finding(tuple(parts))


def _check_product(
    scope: Scope, impl: str, fmt: str, compute: str, group: str, outliers: int
) -> Finding:
    cols, outs = shapes_of(scope)[group]
    linears = make_group(scope, fmt, cols, outs, scope.lora_scale)
    options: dict[str, Any] = {"compute": compute, "outliers": outliers}

    def actual(x: Tensor, dy: Tensor, room: bool) -> Named:
        own = with_room(linears) if room else linears
        return products(own, x, dy, impl, room=room, **options)

    def expected(x: Tensor, dy: Tensor) -> Named:
        return products(widened_linears(linears, x.dtype), x, dy, "ref", **options)

    lengths = scope.sizes.products
    x_dy = [inputs_of(scope, tokens, cols, sum(outs), outliers=outliers) for tokens in lengths]
    return _beside_reference(scope, compute, x_dy, actual, expected)


def _check_other_adapters(scope: Scope, impl: str, compute: str) -> Finding:
    """LoKr, LoKr with weight decomposition, and DoRA, beside the reference's."""
    cols, outs = shapes_of(scope)["q, k and v"]
    linears = with_other_adapters(scope, make_group(scope, PLAIN, cols, outs, 0.5))

    def actual(x: Tensor, dy: Tensor, room: bool) -> Named:
        return products(linears, x, dy, impl, compute=compute)

    def expected(x: Tensor, dy: Tensor) -> Named:
        return products(widened_linears(linears, x.dtype), x, dy, "ref", compute=compute)

    x_dy = [inputs_of(scope, tokens, cols, sum(outs)) for tokens in scope.sizes.products]
    return _beside_reference(scope, compute, x_dy, actual, expected)


def _check_parts(scope: Scope, fmt: str, compute: str, group: str) -> Finding:
    """Text and image at once, beside the reference's products of each."""
    cols, outs = shapes_of(scope)[group]
    # of different values, so that a product with the other part's is noticed
    both = [make_group(scope, fmt, cols, outs, scope.lora_scale, seed=seed) for seed in (7, 17)]

    def text_rows(x: Tensor) -> int:
        return min(scope.sizes.text, len(x) // 2)

    def actual(x: Tensor, dy: Tensor, room: bool) -> Named:
        txt, img = [with_room(own) if room else own for own in both]
        return products_of_parts(txt, img, x, dy, text_rows(x), room=room, compute=compute)

    def expected(x: Tensor, dy: Tensor) -> Named:
        rows, found = text_rows(x), dict[str, Tensor]()
        of_parts = zip(PARTS, both, (slice(rows), slice(rows, None)), strict=True)
        for part, linears, own in of_parts:
            wide = widened_linears(linears, x.dtype)
            made = products(wide, x[own], dy[own], "ref", compute=compute)
            found |= {f"{part} {name}": tensor for name, tensor in made.items()}
        return found

    lengths = [tokens for tokens in scope.sizes.products if tokens > 1]
    x_dy = [inputs_of(scope, tokens, cols, sum(outs)) for tokens in lengths]
    return _beside_reference(scope, compute, x_dy, actual, expected)


def _check_embedders(scope: Scope, impl: str) -> Finding:
    """Into the blocks' width and out of it, with and without adapters, as presets differ."""
    wide, tolerance = reference_dtype(scope.torch_dtype), _tolerance(scope, "same")
    parts, tokens = [], scope.sizes.products[-1]
    with torch.no_grad():
        for said, linears, cols, rows in embedders(scope):
            x, dy = inputs_of(scope, tokens, cols, rows)
            with poisoned_memory():
                actual = products(linears, x, dy, impl)
            expected = products(
                widened_linears(linears, wide), widened(x, wide), widened(dy, wide), "ref"
            )
            found = compare(actual, expected, tolerance)
            parts += [part._replace(name=f"{part.name}, {said}") for part in found]
    return Finding(tuple(parts))


def _time_product(
    scope: Scope, impl: str, fmt: str, compute: str, group: str, outliers: int
) -> Rate:
    cols, outs = shapes_of(scope)[group]
    linears = make_group(scope, fmt, cols, outs, scope.lora_scale)
    x, dy = inputs_of(scope, scope.sizes.timed, cols, sum(outs), outliers=outliers)
    with torch.no_grad():
        run = functools.partial(products, linears, x, dy, impl, compute=compute, outliers=outliers)
        return Rate(4 * len(x) * cols * sum(outs) / seconds_of(run, scope.torch_device), "op/s")


def _check_dropout(scope: Scope, impl: str, compute: str) -> Finding:
    """Adapters on dropped inputs, beside the formula with the mask that the implementation drew."""
    cols, outs = shapes_of(scope)["q, k and v"]
    p, tokens = max(scope.dropout, 0.1), scope.sizes.products[-1]
    seed = torch.tensor(1234, device=scope.torch_device)
    # here the adapters' scale is not 1, which the other checks may leave at 1
    plain = make_group(scope, PLAIN, cols, outs, 0.5)
    dropped = [
        lin._replace(adapters=tuple(lora._replace(dropout=p) for lora in loras_of(lin)))
        for lin in plain
    ]
    x, dy = inputs_of(scope, tokens, cols, sum(outs))
    wide, tolerance = reference_dtype(scope.torch_dtype), _tolerance(scope, compute)
    with torch.no_grad():
        actual = products(dropped, x, dy, impl, compute=compute, dropout_seed=seed)
        # the mask that forward and backward draw for this seed
        group = LinearGroup(dropped, x.dtype, impl=impl, dropout_seed=seed)
        mask = widened(group.dropped(torch.ones_like(x), p), wide)
        linears, wx, wdy = widened_linears(plain, wide), widened(x, wide), widened(dy, wide)
        bare = [lin._replace(adapters=()) for lin in linears]
        expected, column = products(bare, wx, wdy, "ref", compute=compute), 0
        y = expected["y"].split(outs, dim=1)
        for i, lin in enumerate(linears):
            a, b, scale, *_ = loras_of(lin)[0]
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
    # dropout runs on each stream by itself
    paired = PAIRED if scope.dropout == 0 or scope.exhaustive else ()
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
                for group in paired if impl == "triton" else ():
                    yield Check(
                        name=f"{group} of text and image, {fmt} weights{runs} ({said})",
                        run=functools.partial(_check_parts, scope, fmt, compute, group),
                        short=True,
                        **common,
                    )
            if compute == "same":
                run = functools.partial(_check_embedders, scope, impl)
                yield Check(name=f"embedders ({said})", run=run, short=True, **common)
            run = functools.partial(_check_other_adapters, scope, impl, compute)
            yield Check(name=f"LoKr and DoRA{runs} ({said})", run=run, short=True, **common)
            if scope.dropout:
                run = functools.partial(_check_dropout, scope, impl, compute)
                yield Check(
                    name=f"adapters with dropout{runs} ({said})", run=run, short=True, **common
                )
