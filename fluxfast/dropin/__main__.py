"""`python -m fluxfast.dropin SCRIPT ARGS…`: run a trainer, with its FLUX.1 transformer accelerated.

    python -m fluxfast.dropin flux_train_network.py --config_file config.toml
    python -m fluxfast.dropin -m accelerate.commands.launch train_dreambooth_lora_flux.py …

The trainer isn't edited. At the first forward of its transformer `fluxfast.accelerate` is called on
it, and the report is printed to the standard error then and when the program ends. Python processes
that the trainer starts do the same. FLUXFAST_STRICT=1: what can't run fused is an error.
FLUXFAST_SHARE_DROPOUT=1: PEFT's adapters with a dropout run fused, with masks of fluxfast's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from fluxfast.dropin.startup import environment, install

USAGE = "usage: python -m fluxfast.dropin SCRIPT ARGS…, or -m MODULE ARGS…"


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__ if words else USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    by_name, rest = words[0] == "-m", words[1:]
    if by_name and not rest:
        print(USAGE, file=sys.stderr)
        return 2
    if not by_name and not Path(words[0]).exists():
        print(f"fluxfast.dropin: there is no {words[0]}; {USAGE}", file=sys.stderr)
        return 2
    os.environ.update(environment(dict(os.environ)))
    install()
    sys.argv = rest if by_name else words
    if by_name:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        # as Python has it for a script: its folder takes the place of the current one
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
