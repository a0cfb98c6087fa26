"""`fluxfast-bench adapters`: what a step costs with other adapters than LoRA.

Beside a LoRA of rank 16 on every linear of the blocks stand LoKr with several factors, LoKr with
weight decomposition, and DoRA. A step is checkpointed, and chosen and predicted as by
`fluxfast-bench predict`, from counted launches, bytes and operations: nothing is measured. LoKr's
ratio to LoRA has a target.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fluxfast.adapters.presets import is_target
from fluxfast.config.lycoris import LycorisOptions
from fluxfast.memory import rates
from fluxfast.memory.choices import Facts, choose
from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast.memory.plan import predict
from fluxfast.memory.sizes import Workload
from fluxfast.memory.wishes import Wishes
from fluxfast_bench.counted.vram import BASES
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.report import results, targets
from fluxfast_bench.report.predicted import workload_of
from fluxfast_bench.run import told_written
from fluxfast_bench.shapes import SHAPES

DEFAULT_GPUS = ("RTX 4090", "H100")
DEFAULT_SHAPES = ("512px-b1", "1024px-b1")
DEFAULT_BASES = ("bf16", "int8", "nf4")


def _lokr(**options: Any) -> LycorisOptions:
    return LycorisOptions(algo="lokr", full_matrix=True, **options)


BASELINE = "LoRA, rank 16"
# LoKr's options, or the kind of another adapter
ADAPTERS: dict[str, LycorisOptions | str] = {
    BASELINE: "standard",
    "LoKr, factor 16": _lokr(factor=16),
    "LoKr, factor 12": _lokr(factor=12),
    "LoKr, factor 8": _lokr(factor=8),
    "LoKr, factor 16, with weight decomposition": _lokr(factor=16, weight_decompose=True),
    "DoRA, rank 16": "dora",
}


def with_adapter(workload: Workload, adapter: LycorisOptions | str) -> Workload:
    """The same step with another adapter on the same linears."""
    if isinstance(adapter, str):
        return replace(workload, lora_type=adapter)
    names = [linear.name for linear in workload.sizes.linears()]
    on = dict.fromkeys((name for name in names if is_target(name, workload.targets)), adapter)
    return replace(workload, lora_type="lycoris", by_module=on)


def record_of(name: str, gpu: Gpu, base: str, case: str) -> dict[str, Any]:
    """The step with one of ADAPTERS."""
    format = None if base == "bf16" else base
    workload = with_adapter(workload_of(SHAPES[case], format), ADAPTERS[name])
    modulation = sum(workload.modulation_weights) + workload.outer_modulation_weights
    host_seconds = rates.modulation_on_host(modulation)
    facts = Facts(workload.sizes.blocks, format, gpu, workload, host_seconds=host_seconds)
    choices = choose(Wishes(checkpoint_every=1), facts)
    time = predict(replace(workload, compute=choices.compute), choices, gpu)
    return {
        "adapter": name,
        "gpu": gpu.name,
        "format": base,
        "case": case,
        "elements": workload.adapters,
        "seconds": round(time.total, 4),
        "rates": rates.told(gpu),
    }


def records_of(
    gpus: Sequence[Gpu], bases: Sequence[str], cases: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for gpu in gpus:
        for base in bases:
            for case in cases:
                records = [record_of(name, gpu, base, case) for name in ADAPTERS]
                for record in records:
                    ratio = record["seconds"] / records[0]["seconds"]
                    yield record | {"ratio": round(ratio, 4)}


def violations(records: Sequence[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """What takes longer beside LoRA than its target says, a line each."""
    return [
        f"{r['case']} {r['gpu']} {r['format']} {r['adapter']}: {r['ratio']:.3f} of the step with "
        f"{BASELINE}, at most {limits[r['adapter']]}"
        for r in records
        if r["ratio"] > limits.get(r["adapter"], float("inf"))
    ]


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    title = f"predicted seconds a step, and their ratio to {BASELINE}"
    table = Table(title=title, title_justify="left")
    for column in ("case", "GPU", "base", "adapter"):
        table.add_column(column, no_wrap=True)
    for column in ("trained", "seconds", "ratio"):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(
            r["case"], r["gpu"], r["format"], r["adapter"], f"{r['elements'] / 1e6:.1f} M",
            f"{r['seconds']:.3f}", f"{r['ratio']:.3f}",
        )  # fmt: skip
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench adapters",
        description=(
            "What a step costs with LoKr and DoRA beside LoRA, predicted. Exit status 1: one is "
            "above its target."
        ),
    )
    names = {"--gpus": DEFAULT_GPUS, "--shapes": DEFAULT_SHAPES, "--formats": DEFAULT_BASES}
    for option, default in names.items():
        parser.add_argument(option, metavar="N,…", help=f"default: {','.join(default)}")
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "adapters.json", help="default: %(default)s"
    )
    targets.add_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        limits = targets.read(options.targets)["adapters"]
        gpus = [find_gpu(name) for name in (options.gpus or ",".join(DEFAULT_GPUS)).split(",")]
        bases = chosen("--formats", options.formats, BASES, DEFAULT_BASES)
        cases = chosen("--shapes", options.shapes, list(SHAPES), DEFAULT_SHAPES)
    except ValueError as error:
        errors.print(f"fluxfast-bench adapters: {error}", markup=False, soft_wrap=True)
        return 1
    records = list(records_of(gpus, bases, cases))
    results.write_counted(options.out, ["adapters", *argv], records)
    console.print(table_of(records))
    told_written(options.out, console)
    return print_faults(violations(records, limits), errors)
