"""`fluxfast-bench counts`: what a full-size training step launches and moves.

diffusers + PEFT stands beside ours. No GPU is needed. A step is forward, loss and backward of the
reference workload on meta tensors: FLUX.1-dev's shape, rank 16 on every linear of the blocks, batch
1, 512 text tokens. Bytes are counted in four categories. "gemm" are the operands of wide products,
"attention" those of attention, "gemv" those of modulation, whose matrices meet one row a sample,
and "memory" all other bytes, including the adapters' products, which are so narrow that they too
wait for memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fluxfast.memory.launched import CATEGORIES
from fluxfast_bench.counted.meta_step import (
    diffusers_model,
    fluxfast_model,
    forward_backward,
    inputs_of,
)
from fluxfast_bench.counted.tally import Tally, counted
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.progress import in_turn
from fluxfast_bench.report import results, targets
from fluxfast_bench.run import told_written
from fluxfast_bench.shapes import SHAPES, Shape

DEFAULT_SHAPES = ("512px-b1", "1024px-b1")


@dataclass(frozen=True)
class Contestant:
    """One way to train: fluxfast's if `compute` is given, else diffusers + PEFT, eager.

    It checkpoints every block unless `recompute` says otherwise. transposed_codes: as `choose`
    has them on a Hopper GPU with room.
    """

    name: str
    adapters: torch.dtype = torch.bfloat16
    compute: str | None = None
    format: str | None = None
    recompute: str = "full"
    transposed_codes: bool = False

    @property
    def ours(self) -> bool:
        return self.compute is not None

    def model(self, shape: Shape) -> Any:
        if self.compute is None:
            return diffusers_model(shape, adapters=self.adapters)
        return fluxfast_model(
            shape,
            adapters=self.adapters,
            format=self.format,
            compute=self.compute,
            recompute=self.recompute,
            transposed_codes=self.transposed_codes,
        )


# what ours are held against; adapters in fp32, as PEFT's own trainers make them, cost diffusers +
# PEFT more
BASELINE = Contestant("diffusers + PEFT, eager")
CONTESTANTS = (
    BASELINE,
    Contestant("diffusers + PEFT, eager, fp32 adapters", torch.float32),
    Contestant("fluxfast, bf16", compute="same"),
    Contestant("fluxfast, int8", compute="int8", format="int8", transposed_codes=True),
    Contestant(
        "fluxfast, int8, selective recompute",
        compute="int8",
        format="int8",
        recompute="selective",
        transposed_codes=True,
    ),
    Contestant("fluxfast, int8, codes in one order", compute="int8", format="int8"),
    Contestant("fluxfast, nf4 in int8 products", compute="int8", format="nf4"),
)


def count(contestant: Contestant, shape: Shape) -> Tally:
    """A step of the contestant's."""
    model, inputs = contestant.model(shape), inputs_of(shape)
    return counted(lambda: forward_backward(model, inputs), shape.batch)


def record_of(
    contestant: Contestant, shape: Shape, tally: Tally, baseline: Tally
) -> dict[str, Any]:
    """The figures of one contestant on one shape, and their ratios to the baseline's."""
    return {
        "case": shape.name,
        "contestant": contestant.name,
        "ours": contestant.ours,
        "launches": tally.total_launches,
        **{f"{category}_bytes": tally.bytes[category] for category in CATEGORIES},
        "launch_ratio": round(tally.total_launches / baseline.total_launches, 4),
        "memory_ratio": round(tally.bytes["memory"] / baseline.bytes["memory"], 4),
    }


def violations(records: Sequence[dict[str, Any]], limits: dict[str, Any]) -> list[str]:
    """What is above its target, a line each; limits: the table [counts] of the targets."""
    return [
        f"{record['case']} {record['contestant']}: {key} {record[key]:.5g}, at most {limit}"
        for record in records
        for key, limit in targets.count_limits(limits, record)
        if record[key] > limit
    ]


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"one step, GB moved; ratios are to {BASELINE.name}", title_justify="left")
    for column in ("case", "contestant"):
        table.add_column(column, no_wrap=True)
    for column in ("launches", "ratio", "memory", "ratio", "products", "modulation", "attention"):
        table.add_column(column, justify="right")
    for r in records:
        moved = {category: f"{r[f'{category}_bytes'] / 1e9:.1f}" for category in CATEGORIES}
        ratios = f"{r['launch_ratio']:.2f}", f"{r['memory_ratio']:.2f}"
        table.add_row(
            r["case"], r["contestant"], f"{r['launches']:,}", ratios[0],
            moved["memory"], ratios[1], moved["gemm"], moved["gemv"], moved["attention"],
        )  # fmt: skip
    return table


def details_of(tally: Tally, title: str) -> Table:
    """Op by op, the largest first."""
    table = Table("of", "op", "launches", "GB", title=title, title_justify="left")
    for (category, op), moved in tally.op_bytes.most_common():
        table.add_row(category, op, f"{tally.op_launches[category, op]:,}", f"{moved / 1e9:.3f}")
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench counts",
        description=(
            "Bytes and kernel launches of a training step. Exit status 1: one of ours is above "
            "its limit."
        ),
    )
    parser.add_argument(
        "--shapes",
        metavar="S,…",
        help=f"of {', '.join(SHAPES)} (default: {','.join(DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "counts.json", help="default: %(default)s"
    )
    parser.add_argument("--details", action="store_true", help="also op by op")
    targets.add_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        wanted = targets.read(options.targets)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), DEFAULT_SHAPES)
    except ValueError as error:
        errors.print(f"fluxfast-bench counts: {error}", markup=False)
        return 1
    records = []
    for shape in (SHAPES[name] for name in in_turn(shapes)):
        tallies = {contestant: count(contestant, shape) for contestant in CONTESTANTS}
        records += [record_of(c, shape, tally, tallies[BASELINE]) for c, tally in tallies.items()]
        if options.details:
            for contestant, tally in tallies.items():
                console.print(details_of(tally, f"{shape.name} {contestant.name}"))
    results.write_counted(options.out, ["counts", *argv], records)
    console.print(table_of(records))
    told_written(options.out, console)
    return print_faults(violations(records, wanted["counts"]), errors)
