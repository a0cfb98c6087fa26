"""`fluxfast-bench vram`: the memory that a full-size training step takes, for every preset.

No GPU is needed. The 12 B model goes through one step on meta tensors, and every byte alive is
counted (`memory.live_bytes`): weights, adapters in fp32, gradients, AdamW 8-bit's states,
activations, and what kernels take for the time of a call. Beside it stand what `fluxfast-train
plan` predicts, the target, and what the quickstart of SimpleTuner says it takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import _disable_current_modes

from fluxfast.adapters.presets import preset_targets
from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.memory import plan
from fluxfast.memory.engine import Engine
from fluxfast.memory.host import HostMemory
from fluxfast.memory.host_inputs import HostInputs
from fluxfast.memory.live_bytes import LiveBytes
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.memory.stream import BlockStream
from fluxfast.model.modulation import BLOCK_LINEARS
from fluxfast.model.stored_codes import transposed_copies
from fluxfast_bench.counted.meta_step import (
    RANK,
    as_on_gpu,
    fluxfast_model,
    forward_backward,
    host_tensors,
    inputs_of,
)
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results, targets
from fluxfast_bench.run import told_written
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.step.contestants import TARGETS

BASES = ("bf16", "int8", "int4", "nf4", "int2", "fp8_e4m3")
DEFAULT_SHAPES = ("512px-b1", "1024px-b1")
RECOMPUTE = ("full", "selective", "none")
SLOTS = 2
# as the trainer makes them for every optimiser but adamw_bf16
ADAPTERS = torch.float32
# how far the plan may be off
TOLERANCE = 0.015


@dataclass(frozen=True)
class Preset:
    """A way to train whose memory is counted.

    base: "bf16" or a storage format. shape: one of `shapes.SHAPES`. streamed: blocks and their
    inputs are in host memory. transposed_codes: as in `Choices`; no target counts them.
    """

    base: str
    shape: str
    streamed: bool
    recompute: str
    transposed_codes: bool = False

    @property
    def compute(self) -> str:
        """What products run in: as a run chooses it on a GPU that has 8-bit tensor cores."""
        return {"bf16": "same", "fp8_e4m3": "e4m3"}.get(self.base, "int8")

    @property
    def format(self) -> str | None:
        return None if self.base == "bf16" else self.base


def presets(bases: Iterable[str], shapes: Iterable[str]) -> list[Preset]:
    """Every combination."""
    shapes = list(shapes)
    return [
        Preset(b, s, streamed, r)
        for b in bases
        for s in shapes
        for streamed in (False, True)
        for r in RECOMPUTE
    ]


class MetaMemory(HostMemory):
    """Host memory of meta tensors, which `live` is told are not the device's."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live
        self._kept: list[torch.Tensor] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        # a buffer made where bytes are counted would be counted before it can be ignored
        with _disable_current_modes():
            buffer = _bytes(nbytes)
        self._kept.append(buffer)
        self._live.ignore([buffer])
        self.nbytes += nbytes
        return buffer


class MetaEngine(Engine):
    """Copies of meta tensors, from host memory of meta tensors to slots of the ring."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__(torch.device("meta"))
        self.memory = MetaMemory(live)
        self.slots: list[torch.Tensor] = []

    def slot(self, nbytes: int) -> torch.Tensor:
        self.slots.append(super().slot(nbytes))
        return self.slots[-1]


def measure(preset: Preset) -> int:
    """The peak, in bytes, of a step."""
    shape = SHAPES[preset.shape]
    model = fluxfast_model(
        shape,
        adapters=ADAPTERS,
        format=preset.format,
        compute=preset.compute,
        recompute=preset.recompute,
        transposed_codes=preset.transposed_codes,
    )
    inputs = inputs_of(shape)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # made by the first step and kept from then on
    state = OPTIMIZERS["adamw8bit"].state_bytes(ADAPTERS.itemsize) * elements
    others = [_bytes(round(state)), _bytes(plan.GEMM_WORKSPACE)]
    live = LiveBytes()
    live.ignore(host_tensors(model))
    if preset.streamed:
        engine = MetaEngine(live)
        stream = BlockStream(
            model.blocks,
            engine,
            slots=SLOTS,
            inputs=HostInputs(engine.device, MetaMemory(live)),
            leave=BLOCK_LINEARS,
        )
        stream.watch(model)
        others += engine.slots
    groups = (group for block in model.blocks for group in block.linear_groups())
    copies = transposed_copies(groups, preset.compute)
    with as_on_gpu(lambda *_: None), live:
        live.hold([*model.parameters(), *model.buffers(), *inputs.values(), *others])
        live.hold([*copies, *model.gradients.buffers])
        forward_backward(model, inputs)
    return live.peak


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def workload_of(preset: Preset, shape: Shape) -> Workload:
    """The preset as the plan sees it."""
    sizes = FluxSizes.from_config(shape.config)
    return Workload(
        sizes=sizes,
        tokens=(shape.tokens,) * sizes.blocks,
        text_tokens=shape.txt,
        batch=shape.batch,
        storage=Storage(preset.format),
        targets=preset_targets(TARGETS),
        rank=RANK,
        adapter_itemsize=ADAPTERS.itemsize,
        optimizer="adamw8bit",
        compute=preset.compute,
    )


def predict(preset: Preset) -> int:
    """The peak, in bytes, by the plan."""
    workload = workload_of(preset, SHAPES[preset.shape])
    recompute = (preset.recompute,) * workload.sizes.blocks
    slots = SLOTS if preset.streamed else 0
    choices = plan.Choices(
        recompute,
        slots,
        modulation_ahead=True,
        host_inputs=preset.streamed,
        transposed_codes=preset.transposed_codes,
    )
    return plan.account(workload, choices).peak


def limit_of(preset: Preset, wanted: dict[str, Any]) -> float | None:
    """The preset's target in GiB, if it has one."""
    return targets.vram_limit(
        wanted,
        preset.base,
        preset.shape,
        streamed=preset.streamed,
        recompute=preset.recompute,
    )


def record_of(preset: Preset, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a preset; `wanted` has the targets."""
    peak, predicted = measure(preset), predict(preset)
    return {
        "base": preset.base,
        "shape": preset.shape,
        "streamed": preset.streamed,
        "recompute": preset.recompute,
        "gib": round(peak / 2**30, 3),
        "plan_gib": round(predicted / 2**30, 3),
        "plan_error": round(predicted / peak - 1, 4),
        "limit_gib": limit_of(preset, wanted),
    }


def violations(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is above its target, or off the plan: a line each."""
    found = []
    for r in records:
        name = (
            f"{r['base']} {r['shape']} {'streamed' if r['streamed'] else 'resident'} "
            f"{r['recompute']}"
        )
        if r["limit_gib"] is not None and r["gib"] > r["limit_gib"]:
            found.append(f"{name}: {r['gib']:.2f} GiB, at most {r['limit_gib']}")
        if abs(r["plan_error"]) > TOLERANCE:
            found.append(
                f"{name}: the plan says {r['plan_gib']:.2f} GiB, it is {r['gib']:.2f} "
                f"({r['plan_error']:+.1%})"
            )
    return found


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title="peak of the allocator in GiB; the CUDA context, about 0.5, comes on top",
        title_justify="left",
    )
    for column in ("base", "shape", "blocks", "recompute"):
        table.add_column(column, no_wrap=True)
    for column in ("GiB", "plan", "off by", "target", "quickstart"):
        table.add_column(column, justify="right")
    for r in records:
        limit = r["limit_gib"]
        quickstart = (
            targets.QUICKSTART.get(r["base"]) if limit is not None and not r["streamed"] else None
        )
        table.add_row(
            r["base"], r["shape"], "streamed" if r["streamed"] else "resident", r["recompute"],
            f"{r['gib']:.2f}", f"{r['plan_gib']:.2f}", f"{r['plan_error']:+.1%}",
            "" if limit is None else f"{limit}", "" if quickstart is None else f"{quickstart}",
            style="red" if violations([r]) else None,
        )  # fmt: skip
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench vram",
        description=(
            "Memory of a full-size training step. Exit status 1: one is above its target, or "
            "the plan is off."
        ),
    )
    parser.add_argument("--bases", metavar="B,…", help=f"of {', '.join(BASES)} (default: all)")
    parser.add_argument(
        "--shapes",
        metavar="S,…",
        help=f"of {', '.join(SHAPES)} (default: {','.join(DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "vram.json", help="default: %(default)s"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    targets.add_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        wanted = targets.read(options.targets)
        bases = chosen("--bases", options.bases, BASES)
        todo = presets(bases, chosen("--shapes", options.shapes, list(SHAPES), DEFAULT_SHAPES))
    except ValueError as error:
        errors.print(f"fluxfast-bench vram: {error}", markup=False)
        return 1
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool,
        Steps(len(todo), errors) as steps,
    ):
        records = []
        for record in pool.map(partial(record_of, wanted=wanted), todo):
            records.append(record)
            steps.begin(f"counted {record['base']} {record['shape']}")
    results.write_counted(options.out, ["vram", *argv], records)
    console.print(table_of(records))
    told_written(options.out, console)
    return print_faults(violations(records), errors)
