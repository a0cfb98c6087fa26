"""Runs musubi-tuner's script for FLUX.1-Kontext with a small model: `-m
fluxfast_bench.loops.starts.musubi SCRIPT ARGS`.

musubi-tuner knows the sizes of FLUX.1 itself. Before its script runs, unedited, this changes the
transformer's sizes in `musubi_tuner.flux.flux_models.configs_flux_dev_context` to those of the file
that `bfl_files` writes. All of the training is musubi-tuner's own.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any

from fluxfast_bench.loops.bfl_files import flux_sizes
from fluxfast_bench.loops.starts.script import folder_of_script, run_script


def shrink() -> None:
    """Makes the transformer that musubi-tuner will build small."""
    models: Any = importlib.import_module("musubi_tuner.flux.flux_models")
    spec = models.configs_flux_dev_context
    spec.params = replace(spec.params, **flux_sizes())


if __name__ == "__main__":
    folder_of_script(sys.argv[1])
    shrink()
    run_script(sys.argv[1:])
