"""The README's one table: a step beside diffusers + PEFT, and memory beside a quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxfast_bench.report import counted_sections, targets
from fluxfast_bench.report.markdown import conditions_of, markdown_table, versions_of
from fluxfast_bench.report.results import Result
from fluxfast_bench.shapes import SHAPES

# one of our contestants, the words for it, and the peers that stand beside it
STEPS = (
    ("fluxfast", "unquantised", ("diffusers", "diffusers-compile")),
    ("fluxfast-int8+int8", "int8", ("quanto-int8",)),
)
# a base, and whether its blocks are in host memory
PRESETS = (("bf16", False), ("int8", False), ("int4", False), ("nf4", False), ("int8", True))
MEMORY_SHAPE = "1024px-b1"

MODELS = {"flux": "FLUX.1-dev", "small": "a small model", "tiny": "a tiny model"}

Rows = list[list[str]]


def headline(stored: Sequence[Result], root: Path) -> str:
    """The table, and below it the conditions of each half; empty where neither half is there."""
    halves = [half for half in (_steps(stored), _memory(root)) if half is not None]
    if not halves:
        return ""
    rows = [row for rows, _ in halves for row in rows]
    table = markdown_table(["", "fluxfast", "beside it"], rows, left=3)
    return "\n\n".join([table, *(note for _, note in halves)])


def _steps(stored: Sequence[Result]) -> tuple[Rows, str] | None:
    """Of the newest run that has one of ours and its peer; of a GPU's, if there is one."""
    runs = [run for run in stored if run.kind == "step"]
    for run in sorted(runs, key=lambda r: ("cuda" in r.data["conditions"], r.date), reverse=True):
        device = "GPU" if "cuda" in run.data["conditions"] else "CPU"
        for case in dict.fromkeys(record["case"] for record in run.records):
            measured = {
                record["contestant"].partition(":")[0]: record
                for record in run.records
                if record["case"] == case and "reason" not in record
            }
            rows = [row for step in STEPS if (row := _step_row(device, measured, *step))]
            if rows:
                first = next(iter(measured.values()))
                return rows, (
                    f"Training step: {MODELS[SHAPES[case].model]}, {case}, {first['tokens']} "
                    f"tokens, batch {first['batch']}, rank {first['rank']}, "
                    f"{first['optimizer']}; {conditions_of(run)}."
                )
    return None


def _step_row(
    device: str,
    measured: dict[str, dict[str, Any]],
    name: str,
    words: str,
    peers: Sequence[str],
) -> list[str]:
    beside = [f"{_ms(measured[p])} ({measured[p]['title']})" for p in peers if p in measured]
    if name not in measured or not beside:
        return []
    return [f"training step, {device}, {words}", f"**{_ms(measured[name])}**", ", ".join(beside)]


def _ms(record: dict[str, Any]) -> str:
    return f"{record['seconds'] * 1e3:.0f} ms"


def _memory(root: Path) -> tuple[Rows, str] | None:
    data = counted_sections.read("vram", root)
    if data is None:
        return None
    found = {
        (record["base"], record["streamed"]): f"**{record['gib']:.1f} GiB**"
        for record in data["records"]
        if record["shape"] == MEMORY_SHAPE and record["recompute"] == "full"
    }
    rows = []
    for base, streamed in PRESETS:
        if (base, streamed) in found:
            words = f"GPU memory, {base} base{', blocks in host memory' if streamed else ''}"
            beside = f"{targets.QUICKSTART[base]} GiB (SimpleTuner's quickstart)"
            rows.append([words, found[base, streamed], "" if streamed else beside])
    return rows, (
        "GPU memory: FLUX.1-dev at 1024 px, batch 1, 512 text tokens, rank 16 on every linear of "
        "the blocks, AdamW 8-bit, full checkpointing, counted on meta tensors; the CUDA context, "
        f"about 0.5 GiB, comes on top; {versions_of(data['run'])}."
    )
