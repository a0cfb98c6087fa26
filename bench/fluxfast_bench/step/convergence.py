"""`fluxfast-bench convergence`: does a run end at the same loss in every precision?

The demo's data and pipeline, trained for some steps with several seeds in each mode. A step's
noise, timesteps and images come from the seed and the step's number, so that modes of one seed
differ in their arithmetic alone: the mean of those differences is set beside the spread between
seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fluxfast.files import atomic_file, write_atomic
from fluxfast_bench.report.conditions import conditions
from fluxfast_bench.run import told_written

BF16 = {"mixed_precision": "bf16", "optimizer": "adamw_bf16"}
INT8 = BF16 | {"base_model_precision": "int8-quanto"}
MODES: dict[str, dict[str, str]] = {
    "bf16": BF16 | {"compute_precision": "same"},
    "int8 storage": INT8 | {"compute_precision": "same"},
    "int8 compute": INT8 | {"compute_precision": "int8"},
    "fp8 compute": BF16 | {"base_model_precision": "fp8-torchao", "compute_precision": "fp8"},
    "nf4 storage": BF16 | {"base_model_precision": "nf4-bnb", "compute_precision": "same"},
    "int4 storage, int8 compute": BF16
    | {"base_model_precision": "int4-quanto", "compute_precision": "int8"},
}
# the mode that others are compared with: the same optimiser, which a run in fp32 could not have
BASE = "bf16"


def train(config: Path, mode: str, seed: int, steps: int) -> list[float]:
    """The losses of a run of `config` in a mode, its output beside the config."""
    from fluxfast.config.run import load_config
    from fluxfast.train.events import read_metrics
    from fluxfast.train.trainer import train as train_run

    keys = json.loads(config.read_text()) | MODES[mode]
    name = f"{mode.replace(', ', '-').replace(' ', '-')}-{seed}"
    keys |= {
        "seed": seed,
        "max_train_steps": steps,
        "output_dir": str(config.parent / name),
        "cache_dir": str(config.parent / "cache" / "run"),
        "validation_disable": True,
        "checkpoint_step_interval": steps,
        "resume_from_checkpoint": "",
    }
    path = config.with_name(f"{name}.json")
    write_atomic(path, json.dumps(keys).encode())
    train_run(load_config(path), Console(file=io.StringIO()))
    return [row["loss"] for row in read_metrics(config.parent / name / "metrics.jsonl")]


def summarise(losses: dict[str, list[list[float]]], last: int) -> dict[str, dict[str, Any]]:
    """The loss of each mode over the last steps, by seed, beside that of BASE.

    `difference` is the mean over seeds, and `within` says whether it is within the spread of BASE's
    seeds, which "spread" has.
    """
    ends = {mode: [statistics.fmean(run[-last:]) for run in runs] for mode, runs in losses.items()}
    spread = statistics.stdev(ends[BASE])
    rows = {}
    for mode, end in ends.items():
        difference = statistics.fmean(a - b for a, b in zip(end, ends[BASE], strict=True))
        rows[mode] = {
            "loss": end,
            "mean": statistics.fmean(end),
            "difference": difference,
            "within": abs(difference) <= spread,
        }
    return {"spread": {"seeds": spread, "last": last}} | rows


def show(summary: dict[str, dict[str, Any]], console: Console) -> None:
    spread = summary["spread"]
    table = Table(
        title=(
            f"Loss over the last {spread['last']} steps (spread between seeds "
            f"{spread['seeds']:.4f})"
        )
    )
    for column in ("mode", "loss", f"minus {BASE}, same seeds", "within the spread"):
        table.add_column(column)
    for mode, row in summary.items():
        if mode != "spread":
            table.add_row(
                mode,
                f"{row['mean']:.4f}",
                f"{row['difference']:+.4f}",
                "yes" if row["within"] else "[red]no[/]",
            )
    console.print(table)


def plot(losses: dict[str, list[list[float]]], path: Path, window: int = 20) -> None:
    """Each mode's loss, averaged over its seeds and the last `window` steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for mode, runs in losses.items():
        mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        smooth = [statistics.fmean(mean[max(0, i - window + 1) : i + 1]) for i in range(len(mean))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=mode, linewidth=1.2)
    axes.set(
        xlabel="step",
        ylabel=f"loss, mean of {window} steps and {len(runs)} seeds",
        title="The demo in every precision",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
    plt.close(figure)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "fluxfast-bench convergence", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each mode, at least 2 (%(default)s)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=[m for m in MODES if m != BASE],
        metavar="MODE",
        help=f"beside {BASE}: {'; '.join(m for m in MODES if m != BASE)} (all)",
    )
    parser.add_argument("--out", type=Path, help="folder for convergence.json and convergence.png")
    arguments = parser.parse_args(words)
    if arguments.seeds < 2 or arguments.steps < 4:
        parser.error("a spread needs at least 2 seeds, and a run at least 4 steps")
    from fluxfast.cli.demo import write_demo

    console = Console()
    modes = [BASE, *(arguments.modes or [m for m in MODES if m != BASE])]
    losses: dict[str, list[list[float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        config = write_demo(Path(folder), arguments.steps)
        for seed in range(1, arguments.seeds + 1):
            for mode in modes:
                status.update(f"seed {seed} of {arguments.seeds}: {mode}")
                losses[mode].append(train(config, mode, seed, arguments.steps))
    summary = summarise(losses, max(arguments.steps // 4, 1))
    show(summary, console)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = {
            "conditions": conditions(device, ["convergence", *words]),
            "steps": arguments.steps,
            "summary": summary,
            "losses": losses,
        }
        write_atomic(arguments.out / "convergence.json", json.dumps(result, indent=1).encode())
        plot(losses, arguments.out / "convergence.png")
        told_written(arguments.out, console)
    return 0 if all(row["within"] for mode, row in summary.items() if mode != "spread") else 1
