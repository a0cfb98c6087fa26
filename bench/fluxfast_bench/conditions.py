"""The conditions that are stored beside every figure."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it; the version where this is no checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed package may lie within somebody else's checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], capture_output=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return f"fluxfast {version('fluxfast')}"
    return described.stdout.decode().strip()
