"""The picture of `fluxfast-bench quality`: scores and losses side by side, a row for each mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxfast.files import atomic_file
from fluxfast_bench.quality.modes import REFERENCE
from fluxfast_bench.quality.summary import NO_LORA, Record, Row, Spread, rows_of

# two colours that colour-blind people tell apart, and that differ in lightness too
NEW, OLD, GROUP = "#0b6e99", "#e08e0b", "#f2f4f7"


def draw(records: Sequence[Record], settings: Mapping[str, Any], path: Path) -> None:
    """Write the picture; each dot is a seed, each bar their mean."""
    # no display is needed, and none of matplotlib's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(records).values() if row.loss is not None]
    heights = _heights(rows)
    figure = Figure(figsize=(11, 1.6 + 0.3 * (max(heights) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _scores(left, rows, heights, records)
    _losses(right, rows, heights)
    for axis in (left, right):
        for number, (first, last) in enumerate(_bands(rows, heights)):
            if number % 2 == 0:
                axis.axhspan(first - 0.5, last + 0.5, color=GROUP, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.grid(axis="x", alpha=0.3)
    left.set_yticks(heights, [row.mode.name for row in rows])
    left.set_ylim(max(heights) + 0.8, -0.8)
    figure.suptitle(
        f"A LoRA of the toy base in every mode: {settings['steps']} steps, a dot a seed, a bar "
        "their mean",
        fontsize=12,
    )
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def _heights(rows: Sequence[Row]) -> list[float]:
    """Where each row lies, with some room between groups."""
    heights: list[float] = []
    for row, before in zip(rows, [None, *rows], strict=False):
        beginning = before is not None and before.mode.group != row.mode.group
        heights.append(0.0 if not heights else heights[-1] + (1.6 if beginning else 1.0))
    return heights


def _bands(rows: Sequence[Row], heights: Sequence[float]) -> list[tuple[float, float]]:
    """From where to where each group lies."""
    groups: dict[str, list[float]] = {}
    for row, height in zip(rows, heights, strict=True):
        groups.setdefault(row.mode.group, []).append(height)
    return [(min(each), max(each)) for each in groups.values()]


def _scores(
    axis: Any, rows: Sequence[Row], heights: Sequence[float], records: Sequence[Record]
) -> None:
    for key, colour, shift, label in (
        ("concept", NEW, -0.16, "the new concept"),
        ("old", OLD, 0.16, "what the base knew"),
    ):
        for row, height in zip(rows, heights, strict=True):
            _seeds(axis, getattr(row, key), height + shift, colour, factor=100)
        # one mark for the legend
        axis.plot([], [], "o", color=colour, markersize=4, label=label)
        for record in records:
            if record["mode"] == NO_LORA:
                axis.axvline(100 * record[key], color=colour, linestyle=":", linewidth=1)
    axis.plot([], [], ":", color="black", linewidth=1, label="without a LoRA")
    axis.set_xlim(-3, 103)
    axis.set_xlabel("drawings that show what was asked for, %", fontsize=10)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)


def _losses(axis: Any, rows: Sequence[Row], heights: Sequence[float]) -> None:
    for row, height in zip(rows, heights, strict=True):
        if row.mode.name == REFERENCE and row.loss is not None:
            low, high = min(row.loss.values), max(row.loss.values)
            axis.axvspan(low, high, color=NEW, alpha=0.15, label=f"{REFERENCE}'s seeds")
        _seeds(axis, row.loss, height, NEW)
    axis.set_xlabel("evaluation loss (less is better)", fontsize=10)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=False)


def _seeds(axis: Any, spread: Spread | None, height: float, colour: str, factor: float = 1) -> None:
    """A dot a seed, and a bar at their mean."""
    if spread is None:
        return
    values = [factor * value for value in spread.values]
    axis.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.55)
    axis.plot([factor * spread.mean], [height], "|", color=colour, markersize=10, markeredgewidth=2)
