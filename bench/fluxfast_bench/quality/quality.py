"""`fluxfast-bench quality`: what a LoRA comes to in every precision, attention, adapter and policy.

The demo's subject is taught to the toy base in each mode with several seeds. A step's noise, times
and images come from the seed and the step's number, so that modes of one seed differ in nothing but
what they change. A run that is interrupted goes on where it was: what quality.json holds is not run
again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fluxfast.config.settings import ConfigError
from fluxfast.demo import BASE
from fluxfast.files import write_atomic
from fluxfast.train.control import Stopped
from fluxfast_bench.options import print_faults
from fluxfast_bench.progress import Steps
from fluxfast_bench.quality import guard, plot, tables, task
from fluxfast_bench.quality.modes import GROUPS, MODES, Mode, chosen_modes
from fluxfast_bench.quality.store import Store, config_digest
from fluxfast_bench.quality.summary import NO_LORA
from fluxfast_bench.report import results, targets
from fluxfast_bench.report.conditions import conditions
from fluxfast_bench.report.verdict import MISSED
from fluxfast_bench.run import told_written

STEPS, IMAGES, SEEDS = 100, 32, 3
# what a shell reports of a program that Ctrl-C has ended
INTERRUPTED = 130


def digest_of_mode(mode: Mode, steps: int) -> str:
    """A hash of all that a mode's run is told, but for the folders on this machine and the seed."""
    folder = Path()
    keys = task.config_json(folder, folder, steps) | dict(mode.changes)
    return config_digest(keys | {"lycoris": mode.lycoris, "reference": mode.reference})


def run_missing(
    store: Store, modes: Sequence[Mode], base: Path, seeds: Sequence[int], console: Console
) -> None:
    """Run what the store does not hold yet, and add each run when it is done.

    A mode that can't be on this machine is added with the reason before anything is trained, a run
    that breaks off with its error.
    """
    steps, images = store.settings["steps"], store.settings["images"]
    with tempfile.TemporaryDirectory(prefix="fluxfast-quality-") as folder:
        root = Path(folder)
        task.write_task(root)
        able = []
        for mode in modes:
            if reason := _reason(root, base, steps, mode):
                store.add({"mode": mode.name, "reason": reason})
            else:
                able.append(mode)
        todo = [(m, seed) for seed in seeds for m in able if not store.has(m.name, seed)]
        alone = not store.has(NO_LORA, None)
        with Steps(len(todo) + alone, console) as progress:
            if alone:
                progress.begin(NO_LORA)
                scores = asdict(task.score(base, None, images))
                store.add({"mode": NO_LORA, "seed": None, **scores})
            for mode, seed in todo:
                progress.begin(f"seed {seed}, {mode}")
                store.add(_run(root, base, store, mode, seed))


def _reason(root: Path, base: Path, steps: int, mode: Mode) -> str:
    """Why a mode can't be trained on this machine; "" where it can."""
    try:
        return "; ".join(task.problems_of(task.mode_config(root, base, steps, mode, seed=1)))
    except ConfigError as error:
        return "; ".join(error.problems)


def _run(root: Path, base: Path, store: Store, mode: Mode, seed: int) -> dict[str, Any]:
    """The record of a run."""
    record = {
        "mode": mode.name,
        "seed": seed,
        "commit": store.commit,
        "config": digest_of_mode(mode, store.settings["steps"]),
    }
    config = task.mode_config(root, base, store.settings["steps"], mode, seed)
    try:
        outcome = asdict(task.train(config, base, store.settings["images"]))
    # whatever breaks off one of a hundred runs, the others are worth having
    except Stopped:
        raise
    except Exception as error:
        return record | {"failed": f"{type(error).__name__}: {error}"}
    return record | outcome.pop("scores") | outcome


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "fluxfast-bench quality",
        description=f"{__doc__.partition(chr(10))[0]} Exit status 1: a promise is missed.",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help=f"of {'; '.join(MODES)}; or all of a group: {', '.join(GROUPS)} (default: all)",
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="runs of each mode, at least 2 (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (%(default)s)")
    parser.add_argument(
        "--images", type=int, default=IMAGES, help="drawings of new and of old (%(default)s)"
    )
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the pipeline to teach (default: the toy base)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.ROOT,
        help="folder of quality.json, quality.md and quality.png (%(default)s)",
    )
    targets.add_option(parser)
    arguments = parser.parse_args(words)
    if arguments.seeds < 2 or arguments.steps < 1 or arguments.images < 1:
        parser.error("a spread needs at least 2 seeds, and a run at least 1 step and 1 image")
    return arguments


def _begin(arguments: argparse.Namespace, words: Sequence[str], base: Path) -> Store:
    """The store of what is asked for. Raises ValueError where that can't be."""
    if not (base / "model_index.json").is_file():
        raise ValueError(
            f"--base {base}: expected a pipeline's folder, with a model_index.json; "
            "tools/train_toy_base.py makes one"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = conditions(device, ["quality", *words])
    settings = {
        "base": task.fingerprint(base),
        "steps": arguments.steps,
        "images": arguments.images,
        "device": run["device"],
    }
    store = Store(arguments.out, run, settings)
    digests = {name: digest_of_mode(mode, arguments.steps) for name, mode in MODES.items()}
    errors = Console(stderr=True)
    if stale := store.drop_stale(digests):
        errors.print(f"changed since, and run again: {', '.join(stale)}", highlight=False)
    if kept := [record for record in store.records if "loss" in record]:
        commits = ", ".join(sorted({record["commit"] for record in kept}))
        errors.print(f"{len(kept)} runs are there already, of {commits}", highlight=False)
    return store


def main(words: Sequence[str]) -> int:
    arguments = arguments_of(words)
    base = (arguments.base or BASE).resolve()
    try:
        wanted = targets.read(arguments.targets)["quality"]
        guard.check_names(wanted)
        modes = chosen_modes(arguments.modes)
        store = _begin(arguments, words, base)
    except ValueError as error:
        print(f"fluxfast-bench quality: {error}", file=sys.stderr)
        return 1
    errors = Console(stderr=True)
    try:
        run_missing(store, modes, base, range(1, arguments.seeds + 1), errors)
    except (KeyboardInterrupt, Stopped):
        errors.print(f"interrupted: the same command goes on from {store.path}", highlight=False)
        return INTERRUPTED
    verdicts, console = guard.verdicts(store.records, wanted), Console()
    console.print(tables.screen(store.records, verdicts))
    for line in tables.not_run(store.records):
        console.print(line, style="yellow", markup=False, highlight=False)
    page = tables.markdown(vars(store), verdicts)
    write_atomic(arguments.out / "quality.md", f"# Quality by mode\n\n{page}\n".encode())
    plot.draw(store.records, store.settings, arguments.out / "quality.png")
    told_written(arguments.out, console)
    missed = [
        f"{each.name}: wanted {each.wanted}, found {each.found}"
        for each in verdicts
        if each.verdict == MISSED
    ]
    return print_faults(missed, console)
