"""The cases of one trainer, measured in a process of its own."""

from __future__ import annotations

import importlib
import io
import logging
import subprocess
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.trainers.case import Absent, measure
from fluxfast_bench.trainers.importing import code_of

# each trainer's module in `hosts`; those of the packages that are installed need no checkout
INSTALLED = {"diffusers": "diffusers_peft"}
TRAINERS = {
    **INSTALLED,
    "simpletuner": "simpletuner",
    "onetrainer": "onetrainer",
    "ai-toolkit": "ai_toolkit",
    "sd-scripts": "sd_scripts",
    "musubi-tuner": "musubi",
    "comfyui": "comfyui",
}


def cases_of(trainer: str) -> list[str]:
    """What a trainer's cases train, or draw with."""
    return list(_module(trainer).CASES)


def _module(trainer: str) -> Any:
    return importlib.import_module(f"fluxfast_bench.trainers.hosts.{TRAINERS[trainer]}")


def measure_trainer(
    trainer: str, folder: str | None, shape: str, rounds: int, send: Callable[[Any], object]
) -> None:
    """Measures all cases of a trainer.

    Sends ("start", case), then ("measured", case, record), ("failed", case, reason) or ("absent",
    case, reason), for each in turn, and ("done",). folder: its checkout.
    """
    # trainers tell their users much that is none of ours
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    module, empty = _module(trainer), set[str]()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        if folder is not None:
            inside = getattr(module, "INSIDE", ())
            optional = getattr(module, "OPTIONAL", ())
            empty = stack.enter_context(code_of(Path(folder), *inside, optional=optional))
        version = commit_of(folder) if folder is not None else None
        for case, make in module.CASES.items():
            send(("start", case))
            try:
                record = measure(make, SHAPES[shape], rounds)
            except Absent as error:
                send(("absent", case, str(error)))
                continue
            except Exception as error:
                send(("failed", case, f"{type(error).__name__}: {error}".splitlines()[0]))
                continue
            send(("measured", case, {"version": version, "empty": sorted(empty), **record}))
    send(("done",))


def commit_of(folder: str) -> str | None:
    """A checkout's commit; None for a folder that is none."""
    try:
        run = subprocess.run(
            ["git", "-C", folder, "log", "-1", "--format=%h of %cs"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
