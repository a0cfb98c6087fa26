"""The drop-in: `accelerate` gives the FLUX.1 transformer of another program our blocks, in place;
`restore` takes them back.
"""

from fluxfast.dropin.accelerate import accelerate, restore
from fluxfast.dropin.report import LinearReport, Report, inspect

__all__ = ["LinearReport", "Report", "accelerate", "inspect", "restore"]
