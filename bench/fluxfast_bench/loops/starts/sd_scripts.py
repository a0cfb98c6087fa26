"""Runs a script of sd-scripts' with a small model: `-m fluxfast_bench.loops.starts.sd_scripts
SCRIPT ARGS`.

sd-scripts knows the sizes of FLUX.1 and of its encoders itself, and takes none from a file. Before
its script runs, unedited, this changes

- the sizes in `library.flux_models.configs`, of the transformer and of the autoencoder, to those
  of the files that `bfl_files` writes;
- `CLIPConfig` and `T5Config` in `library.flux_utils`, so that they make the toy text encoders'
  configurations of whatever they are given;
- `library.custom_offloading_utils.swap_weight_devices_no_cuda`, which exchanges the weights of two
  blocks without CUDA: it is run where `Tensor.to` always copies. It overwrites a weight once that
  has moved to the CPU, and on a CPU that would be the moved one itself.

All of the training is sd-scripts' own.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any

from fluxfast_bench.loops.bfl_files import AUTOENCODER, config_of, flux_sizes
from fluxfast_bench.loops.starts.script import folder_of_script, run_script
from fluxfast_bench.trainers.hosts.bfl import copies


def shrink() -> None:
    """Makes what sd-scripts will build small."""
    models: Any = importlib.import_module("library.flux_models")
    utils: Any = importlib.import_module("library.flux_utils")
    offloading: Any = importlib.import_module("library.custom_offloading_utils")
    for spec in models.configs.values():
        spec.params = replace(spec.params, **flux_sizes())
        spec.ae_params = replace(spec.ae_params, **AUTOENCODER)
    for name, part in (("CLIPConfig", "text_encoder"), ("T5Config", "text_encoder_2")):
        setattr(utils, name, _small(getattr(utils, name), config_of(part)))
    swap = offloading.swap_weight_devices_no_cuda
    offloading.swap_weight_devices_no_cuda = copies(swap)


def _small(kind: Any, config: dict[str, Any]) -> Any:
    return lambda **_: kind(**config)


if __name__ == "__main__":
    folder_of_script(sys.argv[1])
    shrink()
    run_script(sys.argv[1:])
