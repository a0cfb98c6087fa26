"""How the programs here run a trainer's script, as Python would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def folder_of_script(script: str) -> None:
    """Puts a script's folder first in Python's path, where its modules are looked for."""
    sys.path[0] = str(Path(script).resolve().parent)


def run_script(words: Sequence[str]) -> None:
    """Runs a script with its arguments as the main program."""
    folder_of_script(words[0])
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
