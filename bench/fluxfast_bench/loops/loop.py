"""A trainer's own script on a tiny model: how it is run, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxfast_bench.trainers.case import error_of

# the largest relative difference in fp32 that is rounding, over a few steps of an optimiser: of
# the losses, and of the trained tensors, which have taken steps of a size that errors change
SAME_LOSS, SAME_WEIGHTS = 1e-4, 1e-3
# seconds that a script may take
LIMIT = 900.0
# of which packages a trainer's Python is asked the versions
PACKAGES = ("torch", "diffusers", "transformers", "peft")
# what it is asked by, without importing them
_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for package in sys.argv[1:]:
    try:
        found[package] = version(package)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
# a trainer's codes for a terminal's colours may come before it
_CALLS = re.compile(
    r"fluxfast: \w+ layout, (\d+) of (\d+) blocks can run fused; (\d+) of (\d+) calls did"
)


@dataclass(frozen=True)
class Loop:
    """One run of a trainer's script.

    words: what Python is given: the script, or "-m" and a module, and its arguments.
    saved: a pattern below the run's folder, which the trained adapter's file matches; the last
    by name where there are several.
    losses: the loss of each step, from what the script has printed and from the run's folder.
    folder: where the script is run.
    environment: what it is given beside this process's own.
    """

    words: Sequence[str]
    saved: str
    losses: Callable[[str, Path], list[float]]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


# writes a tiny model, a dataset and a config to a folder that is empty; told the checkout's
# folder, the run's, and how many steps to train
Prepare = Callable[[Path, Path, int], Loop]


@dataclass(frozen=True)
class Trained:
    """What a run left: its losses, its trained tensors, and how its blocks ran."""

    losses: list[float]
    tensors: dict[str, Tensor]
    blocks: int = 0
    blocks_fused: int = 0
    calls: int = 0
    calls_fused: int = 0


def versions_in(python: str) -> dict[str, str]:
    """The versions of those of `PACKAGES` that a Python has; none where it doesn't answer."""
    try:
        asked = subprocess.run(
            [python, "-c", _ASK, *PACKAGES],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
            check=True,
        )
        found: dict[str, str] = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return found


def run(loop: Loop, folder: Path, python: str, *, accelerated: bool) -> Trained:
    """Runs a trainer's script, alone or by `python -m fluxfast.dropin`.

    An accelerated run has to run fused: FLUXFAST_STRICT=1. folder: the run's, with its files;
    python: the interpreter that has the trainer's packages and fluxfast. Raises RuntimeError with
    its last words where the script fails, or has not done what it was for.
    """
    before = ["-m", "fluxfast.dropin"] if accelerated else []
    environment = dict(os.environ) | {"FLUXFAST_STRICT": "1"} | dict(loop.environment)
    try:
        done = subprocess.run(
            [python, *before, *loop.words],
            cwd=loop.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"it ran for more than {LIMIT:.0f} s") from late
    (folder / "printed.txt").write_text(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {_last_words(done.stdout)}")
    files = sorted(folder.glob(loop.saved))
    if not files:
        raise RuntimeError(f"it saved no {loop.saved}")
    losses = loop.losses(done.stdout, folder)
    if not losses:
        raise RuntimeError("it told no loss")
    return Trained(losses, load_file(files[-1]), *_counts(done.stdout))


def _last_words(printed: str) -> str:
    """The last three lines, without colours, and without the folders of a machine."""
    plain = re.sub(r"(?:/[^\s\"'/]+)+/", "", re.sub(r"\x1b\[[0-9;]*m", "", printed))
    return " | ".join(deque((line for line in plain.splitlines() if line.strip()), maxlen=3))


def _counts(printed: str) -> tuple[int, int, int, int]:
    """Blocks, fused blocks, calls and fused calls of the last report that was printed."""
    found = _CALLS.findall(printed)
    if not found:
        return 0, 0, 0, 0
    blocks_fused, blocks, calls_fused, calls = map(int, found[-1])
    return blocks, blocks_fused, calls, calls_fused


def measure(
    prepare: Prepare, checkout: Path, folder: Path, steps: int, python: str = sys.executable
) -> dict[str, Any]:
    """How an accelerated run of a trainer's script differs from a plain one.

    folder: an empty one, for the files of both. Raises RuntimeError as `run` does, and where the
    two trained different tensors, none, or another number of steps.
    """
    runs = []
    for name in ("plain", "accelerated"):
        mine = folder / name
        mine.mkdir(parents=True)
        loop = prepare(checkout, mine, steps)
        runs.append(run(loop, mine, python, accelerated=name == "accelerated"))
    plain, accelerated = runs
    if len(plain.losses) != steps or len(accelerated.losses) != steps:
        told = f"{len(plain.losses)} and {len(accelerated.losses)}"
        raise RuntimeError(f"it told {told} losses, of {steps} steps")
    if plain.tensors.keys() != accelerated.tensors.keys():
        raise RuntimeError("the two saved different tensors")
    trained = [name for name, tensor in plain.tensors.items() if tensor.is_floating_point()]
    pairs = ([each.tensors[name] for name in trained] for each in (accelerated, plain))
    ours, theirs = (torch.tensor(each.losses) for each in (accelerated, plain))
    return {
        "steps": steps,
        "losses": plain.losses,
        "losses_accelerated": accelerated.losses,
        "loss_error": error_of([ours], [theirs]),
        "weights": len(trained),
        "weights_error": error_of(*pairs),
        "blocks": accelerated.blocks,
        "blocks_fused": accelerated.blocks_fused,
        "calls": accelerated.calls,
        "calls_fused": accelerated.calls_fused,
    }
