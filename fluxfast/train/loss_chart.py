"""The chart of a run's losses, `loss.png`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fluxfast.files import atomic_file
from fluxfast.train.evaluation import POOLED, PREFIX
from fluxfast.train.events import is_finite

# in the output folder
CHART_NAME = "loss.png"
Lines = Sequence[dict[str, Any]]
# colours that no other curve has
_HELD_OUT = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def plot_loss(metrics: Lines, path: Path, evaluations: Lines = ()) -> None:
    """Draw `loss.png`: every step's loss and its running mean, and the learning rate below.

    metrics: lines as `read_metrics` gives them, at least one. evaluations: those of
    `read_evaluations`, whose losses are drawn over the steps'.
    """
    # matplotlib takes a second to import, and only the end of a run draws
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [m for m in metrics if is_finite(m.get("regularisation_loss"))]
    # where there is nothing else, a step's loss is that of its regularisation data
    trained = [m for m in metrics if "regularisation_loss" not in m] or metrics
    steps, losses = [m["step"] for m in trained], [m["loss"] for m in trained]
    window = max(1, len(losses) // 25)
    smooth = running_mean(losses, window)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    top.plot(steps, losses, ".", color="0.75", markersize=4, label="each step")
    top.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of the last {window} steps")
    if held and trained is not metrics:
        top.plot(
            [m["step"] for m in held], [m["regularisation_loss"] for m in held],
            ".", color="tab:green", markersize=4, label="regularisation",
        )  # fmt: skip
    highest = sorted(losses)[int(0.98 * (len(losses) - 1))]
    for (name, points), color in zip(
        held_out_curves(evaluations).items(), cycle(_HELD_OUT), strict=False
    ):
        top.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
        highest = max(highest, *(loss for _, loss in points))
    top.set_ylabel("loss")
    top.set_ylim(0, highest * 1.25 or 1)
    top.legend()
    top.grid(alpha=0.3)
    rates = [m.get("learning_rate") for m in metrics]
    bottom.plot(
        [m["step"] for m in metrics],
        [rate if is_finite(rate) else math.nan for rate in rates],
        color="tab:orange",
    )
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with atomic_file(path) as stream:
        figure.savefig(stream, dpi=110, format="png")
    pyplot.close(figure)


def running_mean(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each loss and those before it, of at most `window` together."""
    return [
        sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]


def held_out_curves(evaluations: Lines) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of each held-out dataset; of all together, where they are reported so."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in evaluations:
        single = [name for name in line if name.startswith(PREFIX) and name != POOLED]
        for name in single or [name for name in line if name == POOLED]:
            label = f"held out: {name.removeprefix(PREFIX)}"
            curves.setdefault(label, []).append((line["step"], line[name]))
    return curves
