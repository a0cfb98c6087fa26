"""`fluxfast-bench predict`: how long a training step should take on GPUs that are not here.

The step-time model is `fluxfast-train plan`'s (`fluxfast.memory.step_time`), and the choices are
those that a run makes: checkpointed, with nothing recomputed, with TREAD, or what `vram_budget`
"auto" chooses for that GPU, which may stream blocks. What does not fit is left out.

With --from-results it reads what one GPU has measured (bench/results/<device>): its rates replace
the assumed ones in the package's `rates.json`, and each measured step is shown beside its
prediction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fluxfast.files import write_atomic
from fluxfast.memory import rates
from fluxfast.memory.budget import usable_bytes
from fluxfast.memory.choices import Facts, OverBudget, choose
from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast.memory.plan import account, predict
from fluxfast.memory.step_time import PARTS
from fluxfast.memory.wishes import Wishes
from fluxfast_bench.counted.vram import BASES
from fluxfast_bench.options import chosen, wide_console
from fluxfast_bench.report import measured_rates, predicted, results
from fluxfast_bench.report.predicted import MODES, QUICKSTART, workload_of
from fluxfast_bench.run import told_written
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.step.ours import TREAD

DEFAULT_GPUS = (
    *("RTX 3080", "RTX 3090", "RTX 4080", "RTX 4090", "RTX 5090"),
    *("A100 80GB", "L40S", "H100", "H200"),
)
DEFAULT_SHAPES = ("512px-b1", "1024px-b1")
WISHES = {
    "full": Wishes(checkpoint_every=1),
    "none": Wishes(checkpoint_every=0),
    "tread": Wishes(checkpoint_every=1),
    "auto": Wishes(vram_budget="auto"),
}


def record_of(gpu: Gpu, base: str, case: str, mode: str) -> dict[str, Any]:
    """The prediction for a step; seconds are None where it does not fit."""
    format = None if base == "bf16" else base
    workload = workload_of(SHAPES[case], format, route=TREAD if mode == "tread" else None)
    modulation = sum(workload.modulation_weights) + workload.outer_modulation_weights
    facts = Facts(
        workload.sizes.blocks,
        format,
        gpu,
        workload,
        host_seconds=rates.modulation_on_host(modulation),
    )
    record: dict[str, Any] = {"gpu": gpu.name, "format": base, "case": case, "mode": mode}
    try:
        choices = choose(WISHES[mode], facts)
    except OverBudget:
        return record | {"seconds": None, "rates": rates.told(gpu), "quickstart": None}
    workload = replace(workload, compute=choices.compute)
    needed = account(workload, choices).needed
    fits = needed <= usable_bytes(gpu)
    time = predict(workload, choices, gpu)
    return record | {
        "seconds": round(time.total, 4) if fits else None,
        "parts": {part: round(getattr(time, part), 4) for part in PARTS},
        "compute": choices.compute,
        "recompute": {p: choices.recompute.count(p) for p in dict.fromkeys(choices.recompute)},
        "streamed": choices.streams,
        "modulation_ahead": choices.modulation_ahead,
        "graphs": choices.graphs,
        "needed_gib": round(needed / 2**30, 2),
        "rates": rates.told(gpu),
        "quickstart": QUICKSTART.get((gpu.name, base), {}).get(case) if mode != "tread" else None,
    }


def records_of(
    gpus: Sequence[Gpu], bases: Sequence[str], cases: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for gpu in gpus:
        for base in bases:
            for case in cases:
                for mode in MODES:
                    yield record_of(gpu, base, case, mode)


def table_of(records: Sequence[dict[str, Any]], case: str) -> Table:
    table = Table(
        title=f"{case}: seconds a step, predicted; s: blocks are streamed; -: does not fit",
        title_justify="left",
    )
    for column in ("GPU", "base", "products in"):
        table.add_column(column, no_wrap=True)
    for mode in MODES.values():
        table.add_column(mode.replace("`", ""), justify="right")
    table.add_column("quickstart", justify="right")
    for gpu, base in dict.fromkeys((r["gpu"], r["format"]) for r in records):
        own = {
            r["mode"]: r for r in records if (r["gpu"], r["format"], r["case"]) == (gpu, base, case)
        }
        quickstart = own["auto"]["quickstart"]
        table.add_row(
            gpu, base, own["full"].get("compute", ""),
            *(predicted.seconds_told(own[mode]) for mode in MODES),
            "" if quickstart is None else f"{quickstart:g}",
        )  # fmt: skip
    return table


def take_measured(folder: Path, stored_at: Path, console: Console) -> None:
    """Write what a GPU has measured to the file of rates, and show predictions beside measurements.

    The folder is that of the GPU, or one that has it among others. Raises ValueError where it has
    no results of one GPU of the table.
    """
    stored = results.read_all(folder)
    stored = stored or [r for r in results.read_all(folder.parent) if r.device == folder.name]
    gpu = measured_rates.gpu_of(stored)
    found = measured_rates.measured(stored, gpu)
    if not found:
        raise ValueError(f"{folder}: no ceilings, sweep or profile to take rates from")
    before = rates.rates_of(gpu)
    table = Table("rate", "before", "measured", title=f"{gpu.name}, written to {stored_at.name}")
    for name, rate in found.items():
        known = before.get(name)
        was = "" if known is None else f"{known.value:.3g}{'' if known.measured else ', assumed'}"
        table.add_row(rates.NAMES[name], was, f"{rate['value']:.3g}")
    console.print(table)
    console.print(predicted.comparison_section(stored), highlight=False, markup=False)
    every = rates.read(stored_at)
    every[gpu.name] = every.get(gpu.name, {}) | found
    write_atomic(stored_at, (json.dumps(every, indent=1, sort_keys=True) + "\n").encode())
    told_written(stored_at, console)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench predict", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--gpus",
        metavar="G,…",
        help=f"default: {','.join(DEFAULT_GPUS)}; `fluxfast-train plan --gpu list` has all",
    )
    parser.add_argument(
        "--shapes",
        metavar="S,…",
        help=f"of {', '.join(SHAPES)} (default: {','.join(DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--formats", metavar="F,…", help=f"of the base: {', '.join(BASES)} (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "predict.json", help="default: %(default)s"
    )
    parser.add_argument(
        "--from-results",
        type=Path,
        metavar="DIR",
        help="predict nothing, but take the rates that a GPU has measured from its results",
    )
    parser.add_argument(
        "--rates", type=Path, default=rates.STORED, help="where --from-results writes them"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        if options.from_results is not None:
            take_measured(options.from_results, options.rates, console)
            return 0
        gpus = [find_gpu(name) for name in (options.gpus or ",".join(DEFAULT_GPUS)).split(",")]
        bases = chosen("--formats", options.formats, BASES)
        cases = chosen("--shapes", options.shapes, list(SHAPES), DEFAULT_SHAPES)
    except ValueError as error:
        errors.print(f"fluxfast-bench predict: {error}", markup=False, soft_wrap=True)
        return 1
    records = list(records_of(gpus, bases, cases))
    results.write_counted(options.out, ["predict", *argv], records)
    for case in cases:
        console.print(table_of(records, case))
    for gpu in gpus:
        console.print(f"{gpu.name}: {rates.told(gpu)}", highlight=False)
    told_written(options.out, console)
    return 0
