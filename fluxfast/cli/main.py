"""The command line `fluxfast-train`. Without a command's name, `train` is meant."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from fluxfast import __version__
from fluxfast.text import command_list
from fluxfast.threads import share_cores

# command: (module of fluxfast.cli, one line of help); a module is imported when its command runs
COMMANDS = {
    "train": ("train", "train a LoRA of a config; this is meant where no command is named"),
    "demo": ("demo", "train on a small model and photographs: no network, no GPU, minutes"),
    "plan": ("plan", "what a run takes on a GPU, before anything is downloaded"),
    "data": ("data", "what the datasets become, before anything is encoded"),
    "keys": ("keys", "every key of the config files, or those about a word"),
    "doctor": ("doctor", "check this machine: its kernels and how fast it is"),
    "cache": ("cache", "what runs have kept to start quickly, and how to clear it"),
    "report": ("report", "one HTML page about a run: losses, images, config"),
    "inspect": ("inspect", "what a LoRA's file holds, and which programs read it"),
    "convert": ("convert", "write a LoRA in another program's form"),
    "merge": ("merge", "put an adapter into a transformer's weights"),
    "extract": ("extract", "a LoRA of the difference between two transformers"),
    "quantize": ("quantize", "write a transformer in a storage format"),
}
HELP_FLAGS = ("-h", "--help", "help")


def usage() -> str:
    listed = command_list({name: text for name, (_, text) in COMMANDS.items()})
    return (
        "fluxfast-train: train LoRAs of FLUX.1\n\n"
        "  fluxfast-train CONFIG.json [--option=value ...]\n"
        "  fluxfast-train COMMAND ...\n\n"
        f"{listed}\n\n"
        "`fluxfast-train COMMAND --help` says more; --version"
    )


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
