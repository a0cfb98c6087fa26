"""The conditions that are stored beside every figure."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fluxfast import __version__
from fluxfast.doctor.machine import cpu_name

# what a step's time may depend on, the peers among it
PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "peft", "accelerate"),
    *("optimum-quanto", "bitsandbytes", "sdnq", "torchao"),
)
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it.

    What the environment names in FLUXFAST_COMMIT comes first: a machine may have got the files of
    another commit than its checkout is at. Without a checkout it is the version of fluxfast.
    """
    if named := os.environ.get("FLUXFAST_COMMIT"):
        return named
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed package may lie within somebody else's checkout
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return f"fluxfast {__version__}"
    return described.stdout.decode().strip()


def installed(package: str) -> str | None:
    """A distribution's version; None where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """As its maker calls it, with the number of threads that a CPU computes in."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device's name as that of a folder: "nvidia-h200"."""
    return re.sub(
        r"[^a-z0-9]+", "-", re.sub(r"\((R|TM|C)\)", "", name, flags=re.IGNORECASE).lower()
    ).strip("-")


def repeatable(command: Sequence[str]) -> str:
    """The command line without what belongs to the machine: folders, and where results went."""
    words = list(command)
    for option in ("--results", "--out"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(
        [
            "fluxfast-bench",
            *(Path(word).name if Path(word).is_absolute() else word for word in words),
        ]
    )


def conditions(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Device, driver, clocks, versions, commit, command and date (UTC) of a run."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(device),
        "commit": commit(),
        "command": repeatable(command),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            package: number for package in PACKAGES if (number := installed(package)) is not None
        },
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["gpu"] = _nvidia_smi(device)
    return found


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks in MHz and limits as nvidia-smi tells them; nothing where there is none."""
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
        f"--id={device.index or 0}",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, check=True, timeout=30).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return {}
    return dict(
        zip(SMI_FIELDS, (word.strip() for word in answer.splitlines()[0].split(",")), strict=False)
    )
