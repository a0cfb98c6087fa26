"""Plots of stored steps for each device.

One shows rate and memory beside the peers, the other how the rate changes with tokens and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxfast_bench.report.results import Result

STEP, SCALING = "step.png", "scaling.png"
OURS, PEER = "#d1495b", "#8d99ae"
MARKERS = "os^"


def draw(stored: Sequence[Result], root: Path) -> list[Path]:
    """Writes what there is something to draw for; returns the paths."""
    written = []
    for device in sorted({result.device for result in stored if result.kind == "step"}):
        cases = _cases(
            [result for result in stored if result.device == device and result.kind == "step"]
        )
        if cases:
            written.append(_bars(cases, device, root / device / STEP))
        if len(cases) > 1:
            written.append(_scaling(cases, device, root / device / SCALING))
    return written


def _cases(runs: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """Of each case the newest run's measured records."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(runs, key=lambda r: r.date):
        for case in dict.fromkeys(record["case"] for record in result.records):
            records = [r for r in result.records if r["case"] == case and "reason" not in r]
            if records:
                cases[case] = records
    return cases


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    # no display is needed, and none of matplotlib's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _bars(cases: dict[str, list[dict[str, Any]]], device: str, path: Path) -> Path:
    memory = any("peak_gib" in record for records in cases.values() for record in records)
    height = sum(0.28 * len(records) + 0.9 for records in cases.values())
    figure, axes = _figure(len(cases), 2 if memory else 1, 11 if memory else 7.5, height + 0.4)
    for row, (case, records) in zip(axes, cases.items(), strict=True):
        ordered = sorted(records, key=lambda r: -r["seconds"])
        names = [f"{r['contestant']}" for r in ordered]
        colours = [OURS if r["ours"] else PEER for r in ordered]
        panels = [("steps a second", [1 / r["seconds"] for r in ordered], "{:.3g}")]
        if memory:
            panels.append(("peak GiB", [r.get("peak_gib", 0.0) for r in ordered], "{:.1f}"))
        for axis, (label, values, form) in zip(row, panels, strict=True):
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(
                bars, labels=[form.format(value) for value in values], padding=3, fontsize=8
            )
            axis.set_xlabel(label, fontsize=8)
            axis.set_xlim(0, max(values) * 1.15)
            _plain(axis)
        row[0].set_title(case, loc="left", fontsize=10)
        if memory:
            row[1].set_yticklabels([])
    figure.suptitle(device, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def _scaling(cases: dict[str, list[dict[str, Any]]], device: str, path: Path) -> Path:
    """Two panels: rates over tokens at the smallest batch, and rates over the batch."""
    records = [record for group in cases.values() for record in group]
    batch = min(record["batch"] for record in records)
    figure, ((left, right),) = _figure(1, 2, 12, 4.2)
    handles: list[Any] = []
    for number, name in enumerate(dict.fromkeys(record["contestant"] for record in records)):
        own = [record for record in records if record["contestant"] == name]
        style: dict[str, Any] = {
            "color": f"C{number % 10}",
            "marker": MARKERS[number // 10 % len(MARKERS)],
            "markersize": 4,
        }
        if not own[0]["ours"]:
            style["linestyle"] = "--"
        over_tokens = sorted((r["tokens"], 1 / r["seconds"]) for r in own if r["batch"] == batch)
        handles += (
            left.plot(*zip(*over_tokens, strict=True), label=name, **style) if over_tokens else []
        )
        for tokens in sorted({r["tokens"] for r in own}):
            over_batch = sorted(
                (r["batch"], r["batch"] / r["seconds"]) for r in own if r["tokens"] == tokens
            )
            if len(over_batch) > 1:
                right.plot(*zip(*over_batch, strict=True), **style)
                right.annotate(f" {tokens} tokens", over_batch[-1], fontsize=6, va="center")
    for axis, x, y in (
        (left, f"tokens, batch {batch}", "steps a second"),
        (right, "batch", "samples a second"),
    ):
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(y, fontsize=8)
        axis.set_ylim(bottom=0)
        if not axis.lines:
            axis.text(
                0.5,
                0.5,
                "measured at one value only",
                ha="center",
                transform=axis.transAxes,
                fontsize=8,
            )
        _plain(axis)
    right.set_xticks(sorted({record["batch"] for record in records}))
    right.margins(x=0.15)
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(device, fontsize=11)
    figure.savefig(path, dpi=110)
    return path
