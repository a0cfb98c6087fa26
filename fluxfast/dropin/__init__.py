"""The drop-in: other programs' FLUX.1 transformers on our blocks, in place.

`accelerate` gives a transformer our blocks, `restore` takes them back, and `inspect` says what runs
how. `hosts` changes a block's class; `host_diffusers`, `host_concatenated` and `host_bfl` each know
the blocks of one kind of host.
"""

from fluxfast.dropin.accelerate import accelerate, restore
from fluxfast.dropin.report import LinearReport, Report, inspect

__all__ = ["LinearReport", "Report", "accelerate", "inspect", "restore"]
