"""The drop-in: other programs' FLUX.1 transformers on our blocks, in place.

`accelerate` gives a transformer our blocks, `restore` takes them back, and `inspect` says what runs
how. `hosts` changes a block's class; `host_diffusers`, `host_concatenated` and `host_bfl` each know
the blocks of one kind of host. `python -m fluxfast.dropin` runs another program's script with all
of that (`startup`).
"""

import importlib
from typing import TYPE_CHECKING

# for type checkers, which can't follow `__getattr__`
if TYPE_CHECKING:
    from fluxfast.dropin.acceleration import accelerate, restore
    from fluxfast.dropin.report import LinearReport, Report, inspect

# a script that `python -m fluxfast.dropin` runs may set what torch reads when it is imported
_HOMES = {
    "LinearReport": "fluxfast.dropin.report",
    "Report": "fluxfast.dropin.report",
    "accelerate": "fluxfast.dropin.acceleration",
    "inspect": "fluxfast.dropin.report",
    "restore": "fluxfast.dropin.acceleration",
}
__all__ = ["LinearReport", "Report", "accelerate", "inspect", "restore"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
