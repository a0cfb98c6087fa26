"""The command line `fluxfast-train`. Without a command's name, `train` is meant."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from fluxfast import __version__
from fluxfast.threads import share_cores

# command: (module of fluxfast.cli, one line of help); a module is imported when its command runs
COMMANDS = {
    "train": ("train", "train a LoRA: fluxfast-train [train] [CONFIG.json] [--option=value ...]"),
    "plan": (
        "plan",
        "what a run takes, before anything is loaded: fluxfast-train plan CONFIG.json [--gpu NAME]",
    ),
    "data": (
        "data",
        "what the datasets will become, before anything is encoded: fluxfast-train data "
        "CONFIG.json [--out DIR]",
    ),
    "keys": ("keys", "every key of the config files: fluxfast-train keys [WORD]"),
    "doctor": (
        "doctor",
        "check this machine: its kernels and its rates: fluxfast-train doctor [CONFIG.json] "
        "[--all] [--json]",
    ),
    "cache": (
        "cache",
        "what runs have kept of their computations, and how to clear it: fluxfast-train cache "
        "[--clear]",
    ),
    "demo": (
        "demo",
        "make a small pipeline and dataset and train on them: no network, no GPU, a few minutes",
    ),
    "report": (
        "report",
        "one HTML page about a run: losses, images, config: fluxfast-train report OUT",
    ),
    "quantize": (
        "quantize",
        "write a transformer in a storage format: fluxfast-train quantize SRC DST --format FORMAT",
    ),
    "merge": (
        "merge",
        "put an adapter into a transformer's weights: fluxfast-train merge BASE LORA DST",
    ),
    "extract": (
        "extract",
        "a LoRA of the difference of two transformers: fluxfast-train extract BASE TUNED DST "
        "--rank R",
    ),
    "convert": (
        "convert",
        "write a LoRA in another program's names: fluxfast-train convert SRC DST --format FORMAT",
    ),
    "inspect": (
        "inspect",
        "what a LoRA's file holds and who reads it: fluxfast-train inspect FILE [--plot OUT.png]",
    ),
}
HELP_FLAGS = ("-h", "--help", "help")


def usage() -> str:
    lines = ["fluxfast-train: train FLUX.1 LoRAs", ""]
    lines += [f"  fluxfast-train {name:8} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "  --version; `fluxfast-train COMMAND --help` says more"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in HELP_FLAGS:
        print(usage())
        return 0
    if words and words[0] == "--version":
        print(__version__)
        return 0
    for stream in (sys.stdout, sys.stderr):
        # print names that the terminal can't show with backslashes, rather than end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name = words.pop(0) if words and words[0] in COMMANDS else "train"
    # these libraries' hints are for people who call them directly
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    share_cores()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # it warns that it found no 4-bit kernels for a CPU, which nothing here would call
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(f"fluxfast.cli.{COMMANDS[name][0]}").main(words)
