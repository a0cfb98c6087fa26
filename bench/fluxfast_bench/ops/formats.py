"""`fluxfast-bench formats`: the error of each storage format on FLUX.1-like weights.

optimum-quanto's and bitsandbytes' formats stand beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from fluxfast.quant import FORMATS, QuantWeight
from fluxfast_bench.options import wide_console
from fluxfast_bench.report.conditions import commit, installed

# columns of most of FLUX.1's weights
COLS = 3072


class Coder(NamedTuple):
    """One way to store a weight.

    `encode` returns what the weight is decoded to, in fp32, and the bytes that it takes.
    """

    maker: str
    name: str
    encode: Callable[[Tensor], tuple[Tensor, int]]


class Result(NamedTuple):
    """A coder's bits a weight, and its relative error (root mean square) by the kind of weight.

    Where there are none, `why` says so.
    """

    maker: str
    name: str
    bits: float | None
    errors: dict[str, float]
    why: str | None = None


def gaussian(rows: int, seed: int) -> Tensor:
    """Normal numbers [rows, COLS] in bf16, rows of log-normal size (sigma 0.5), as FLUX.1's are."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, COLS, generator=g)
        * 0.02
        * torch.exp(0.5 * torch.randn(rows, 1, generator=g))
    ).bfloat16()


def heavy_tailed(rows: int, seed: int) -> Tensor:
    """Student's t with 3 degrees of freedom [rows, COLS] in bf16.

    Such a number is a normal one over the root of a mean of three squared normal ones.
    """
    g = torch.Generator().manual_seed(seed)
    size = (
        torch.stack([torch.randn(rows, COLS, generator=g).square() for _ in range(3)])
        .mean(0)
        .sqrt()
    )
    return (0.02 * torch.randn(rows, COLS, generator=g) / size).bfloat16()


WEIGHTS = {"gaussian": gaussian, "heavy-tailed": heavy_tailed}


def ours(name: str) -> Coder:
    def encode(weight: Tensor) -> tuple[Tensor, int]:
        packed = QuantWeight.of(weight, FORMATS[name])
        return packed.to(torch.float32), packed.nbytes

    return Coder("fluxfast", name, encode)


def quanto(name: str) -> Coder:
    """quanto's own choices for a linear: a scale a row of 8 bits, groups of 128 below that."""

    def encode(weight: Tensor) -> tuple[Tensor, int]:
        import optimum.quanto as q

        qtype = getattr(q, name)
        # in fp32, which costs it no accuracy; its scales take the two bytes that they do in a bf16
        # model
        weight = weight.float()
        if qtype.bits == 8:
            scale = q.AbsmaxOptimizer()(weight, qtype, 0)
            made = q.quantize_weight(weight, qtype, 0, scale)
            return made.dequantize(), weight.numel() + 2 * scale.numel()
        scale, shift = q.MaxOptimizer()(weight, qtype, 0, 128)
        made = q.quantize_weight(weight, qtype, 0, scale, shift, 128)
        return made.dequantize(), weight.numel() * qtype.bits // 8 + 2 * (
            scale.numel() + shift.numel()
        )

    return Coder("optimum-quanto", name, encode)


def bitsandbytes(name: str) -> Coder:
    def encode(weight: Tensor) -> tuple[Tensor, int]:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.float(), blocksize=64, compress_statistics=True, quant_type=name
        )
        statistics = (state.absmax, state.state2.absmax, state.offset)
        return bnb.dequantize_4bit(packed, state), packed.nbytes + sum(
            part.nbytes for part in statistics
        )

    return Coder("bitsandbytes", name, encode)


# what has about the same bits stands together
GROUPS: dict[str, tuple[Coder, ...]] = {
    "8 bits": (ours("int8"), ours("fp8_e4m3"), quanto("qint8"), quanto("qfloat8_e4m3fn")),
    "4 bits": (
        ours("int4"),
        ours("nf4"),
        quanto("qint4"),
        bitsandbytes("nf4"),
        bitsandbytes("fp4"),
    ),
    "2 bits": (ours("int2"), quanto("qint2")),
}


def measure(coder: Coder, rows: int, seed: int) -> Result:
    """The coder's errors against the weights that it was given, in fp64."""
    if coder.maker != "fluxfast" and installed(coder.maker) is None:
        return Result(coder.maker, coder.name, None, {}, "not installed")
    errors, size = {}, 0
    for kind, make in WEIGHTS.items():
        weight = make(rows, seed)
        decoded, size = coder.encode(weight)
        exact = weight.double()
        errors[kind] = float((decoded.double() - exact).norm() / exact.norm())
    return Result(coder.maker, coder.name, 8 * size / (rows * COLS), errors)


def measure_all(rows: int, seed: int) -> Iterator[tuple[str, Result]]:
    """Every coder's result, with the name of its group."""
    for group, coders in GROUPS.items():
        for coder in coders:
            yield group, measure(coder, rows, seed)


def table_of(results: Sequence[tuple[str, Result]]) -> Table:
    """Errors in per cent, the least of each group in bold."""
    table = Table(
        "format",
        "",
        "bits a weight",
        *(f"{kind}, %" for kind in WEIGHTS),
        title="relative error, root mean square",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for group in GROUPS:
        table.add_section()
        members = [result for name, result in results if name == group]
        for r in members:
            if r.bits is None:
                table.add_row(r.name, r.maker, r.why)
                continue
            cells = []
            for kind, error in r.errors.items():
                is_least = error == min(m.errors[kind] for m in members if m.errors)
                cells.append(f"[bold]{100 * error:.3f}[/]" if is_least else f"{100 * error:.3f}")
            table.add_row(r.name, r.maker, f"{r.bits:.3f}", *cells)
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench formats",
        description=(
            "Errors of the storage formats beside optimum-quanto's and bitsandbytes' on random "
            f"bf16 weights [rows, {COLS}]; a peer that is not installed is listed as such."
        ),
    )
    parser.add_argument("--rows", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the conditions, in place of the table"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.rows < 1:
        print(
            f"fluxfast-bench formats: --rows: expected 1 or more, got {options.rows}",
            file=sys.stderr,
        )
        return 1
    results = list(measure_all(options.rows, options.seed))
    if options.json:
        versions = {name: installed(name) for name in ("torch", "optimum-quanto", "bitsandbytes")}
        conditions = {
            "commit": commit(),
            "rows": options.rows,
            "cols": COLS,
            "seed": options.seed,
            "versions": versions,
        }
        rows = [{"group": group, **result._asdict()} for group, result in results]
        print(json.dumps({"conditions": conditions, "results": rows}, indent=2))
    else:
        wide_console().print(table_of(results))
    return 0
