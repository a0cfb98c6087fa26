"""`fluxfast-bench sweep`: each of a step's wide products, timed with every tile that it could have.

The products are those that a step asks for, recorded on meta tensors, with their adapters and the
layout of each operand. What is printed is the best tile of each beside the one that would be
chosen; every timing is stored. `--write-tiles` puts the best where products look first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fluxfast.files import write_atomic
from fluxfast_bench.counted.launches import Launch
from fluxfast_bench.counted.meta_step import (
    recorded,
)
from fluxfast_bench.counted.prewarm import compile_all, own_target
from fluxfast_bench.ops.products import PRECISIONS, Product, products_of
from fluxfast_bench.options import (
    add_case_options,
    chosen,
    chosen_device,
    print_faults,
    wide_console,
)
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import gpu_sections, results
from fluxfast_bench.report.conditions import conditions
from fluxfast_bench.run import Run, told_written
from fluxfast_bench.shapes import SHAPES, default_shapes
from fluxfast_bench.timing import best_time, time_each
from fluxfast_kernels.launch import arch_key, interpreted, multiprocessors
from fluxfast_kernels.tiles import MEASURED, TILES, Tile, merged, read_measured
from fluxfast_kernels.waves import product_numbers

# in Triton's interpreter, where the time says nothing
INTERPRETED = (Tile(16, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2))


def name_of(numbers: Mapping[str, int]) -> str:
    """ "128x256x128 w8 s3 persistent cut": a tile, its warps and stages, and its schedule."""
    tile = "x".join(str(numbers[f"BLOCK_{axis}"]) for axis in "MNK")
    how = [name for name in ("PERSISTENT", "CUT") if numbers.get(name)]
    return " ".join(
        [tile, f"w{numbers['num_warps']}", f"s{numbers['num_stages']}", *map(str.lower, how)]
    )


def table_numbers(product: Product, device: torch.device) -> Mapping[str, int]:
    """The launch numbers that `matmul` would choose."""
    kind, k = product.kind(device), product.size[2]
    arch = arch_key(device)
    return product_numbers(kind, product.rows, product.cols, k, arch, multiprocessors(device))


def candidates(product: Product, device: torch.device) -> list[Mapping[str, int]]:
    """Launch numbers to try, those that `matmul` would choose first."""
    kind, arch, chosen = product.kind(device), arch_key(device), table_numbers(product, device)
    tables = [TILES[kind]]
    schedules: list[dict[str, int]] = [{}]
    if kind.endswith("_persistent"):
        tables.append(TILES[kind.removesuffix("_persistent")])
        schedules = [{"PERSISTENT": 1, "CUT": 0}, {"PERSISTENT": 1, "CUT": 1}]
    tried = [chosen]
    for table in tables:
        tiles = INTERPRETED if interpreted() else table.get(arch) or table["default"]
        tried += [{**chosen, **tile.numbers, **own} for tile in tiles for own in schedules]
        # the other kernel, which computes the same
        schedules = [{"PERSISTENT": 0, "CUT": 0}]
    return list({name_of(numbers): numbers for numbers in tried}.values())


def launches_of(wanted: Sequence[Product], target: str) -> list[Launch]:
    """What there is to compile before anything is timed."""
    meta = torch.device("meta")

    def run() -> None:
        for product in wanted:
            call = product.on(meta)
            for numbers in candidates(product, meta):
                call(numbers)

    return list(recorded(run, target))


def time_product(product: Product, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A record for each tile."""
    call, records = product.on(device), []
    table = name_of(table_numbers(product, device))
    m, n, k = product.size
    for numbers in candidates(product, device):
        name = name_of(numbers)
        record: dict[str, Any] = {
            "contestant": str(product),
            "mode": name,
            "m": m,
            "n": n,
            "k": k,
            "table": name == table,
            "kind": product.kind(device),
            "rows": product.rows,
            "cols": product.cols,
            "numbers": dict(numbers),
        }
        try:
            one = partial(call, numbers)
            # what the interpreter takes is worth no second call
            taken = (
                time_each(one, 1, device)[0] if interpreted() else best_time(one, device, seconds)
            )
        except Exception as error:
            # Triton's own: a tile that has no room in shared memory, or that its compiler refuses
            records.append(
                record | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            )
            if device.type == "cuda":
                # raises again where the device has failed for good
                torch.cuda.synchronize(device)
            continue
        records.append(record | {"seconds": taken, "tflops": product.flops / taken / 1e12})
    return records


def measured_rows(
    records: Sequence[dict[str, Any]], device: torch.device, run: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The fastest launch numbers of each product, as `tiles.MEASURED` stores them."""
    of_gpu = {
        "arch": arch_key(device),
        "multiprocessors": multiprocessors(device),
        "gpu": run["device"],
        "date": run["date"],
    }
    told = ("kind", "rows", "cols", "k", "numbers", "seconds")
    return [
        {**{name: best[name] for name in told}, **of_gpu} for best in gpu_sections.best_of(records)
    ]


def write_tiles(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts rows of measured tiles into a file that may hold others."""
    known = read_measured(path) if path.exists() else []
    lines = ",\n".join(f"  {json.dumps(row)}" for row in merged(known, rows))
    write_atomic(path, f'{{"rows": [\n{lines}\n]}}\n'.encode())


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "case",
        "product",
        "times",
        "best tile",
        "µs",
        "TFLOP/s",
        "the table's µs",
        "a step, ms less",
    )
    for r in gpu_sections.best_of(records):
        gained = (
            ""
            if r["table_seconds"] is None
            else f"{(r['table_seconds'] - r['seconds']) * r['count'] * 1e3:.2f}"
        )
        before = "" if r["table_seconds"] is None else f"{r['table_seconds'] * 1e6:.1f}"
        table.add_row(r["case"], r["contestant"], str(r["count"]), r["mode"],
        f"{r['seconds'] * 1e6:.1f}",
                      f"{r['tflops']:.1f}", before, gained)  # fmt: skip
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench sweep", description=__doc__.split("\n\n")[0].partition(": ")[2]
    )
    add_case_options(parser)
    parser.add_argument(
        "--precisions", metavar="P,…", help=f"of {', '.join(PRECISIONS)} (default: all)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.02,
        help="that each timing takes, about (default: %(default)s)",
    )
    parser.add_argument(
        "--most", type=int, help="only so many products of each case and precision, the largest"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers (default: %(default)s)"
    )
    parser.add_argument(
        "--write-tiles", type=Path, nargs="?", const=MEASURED, metavar="FILE",
        help="put the fastest of each product where products look first (default: %(const)s)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        precisions = chosen("--precisions", options.precisions, list(PRECISIONS))
        if device.type == "cpu" and not interpreted():
            raise ValueError(
                "there is no GPU: TRITON_INTERPRET=1 runs the kernels on the CPU, to try the "
                "command"
            )
    except ValueError as error:
        print(f"fluxfast-bench sweep: {error}", file=sys.stderr)
        return 1
    # by precision and shape: the products and how often each comes
    wanted = {
        (p, s): dict([*products_of(SHAPES[s], p).items()][: options.most])
        for p in precisions
        for s in shapes
    }
    if not interpreted():
        launches = launches_of(
            [product for found in wanted.values() for product in found], own_target()
        )
        compiling = results.Journal(
            options.results, "prewarm", conditions(torch.device("cpu"), ["sweep", *argv])
        )
        compile_all(launches, own_target(), options.jobs, compiling, Console(stderr=True))
        compiling.finish()
    run = Run(options.results, device, ["sweep", *argv])
    journal = run.journal
    with Steps(sum(map(len, wanted.values()))) as steps:
        for (_, shape), found in wanted.items():
            for product, count in found.items():
                steps.begin(f"{shape} {product}")
                for record in time_product(product, device, options.seconds):
                    journal.record({"case": shape, "ours": True, "count": count, **record})
    console, records = wide_console(), journal.records()
    if options.write_tiles:
        write_tiles(options.write_tiles, measured_rows(records, device, run.conditions))
        told_written(options.write_tiles, console)
    console.print(table_of(records))
    run.finish(console)
    return print_faults(gpu_sections.untimed(records), console)
