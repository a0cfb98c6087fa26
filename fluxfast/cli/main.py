"""The command line `fluxfast-train`. Without a command's name, `train` is meant."""

from __future__ import annotations

import glob
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fluxfast import __version__
from fluxfast.cli.complain import complain
from fluxfast.cli.interrupt import STATUS, ends_imports
from fluxfast.text import command_list, nearest
from fluxfast.threads import share_cores

# command: (module of fluxfast.cli, one line of help); a module is imported when its command runs
COMMANDS = {
    "train": ("train", "train a LoRA of a config; this is meant where no command is named"),
    "demo": ("demo", "teach a toy model something new: no network, no GPU, two minutes"),
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
# what a shell reports of a program that SIGPIPE (13), which Windows does not have, has ended
_UNREAD = 128 + 13


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
    """Run a command; returns the exit status.

    That is 130 after Ctrl-C and 141 where nobody reads the output any more, as a shell has it of
    programs that these end.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with ends_imports():
            status = _run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        complain("interrupted")
        return STATUS
    except BrokenPipeError:
        return _unread()
    except SystemExit as ended:
        # what rich makes of a BrokenPipeError
        if isinstance(ended.__context__, BrokenPipeError):
            return _unread()
        raise


def _run(words: list[str]) -> int:
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
    if words and words[0] not in COMMANDS and _is_nothing(words[0]):
        near = nearest(words[0], COMMANDS)
        answer = f"did you mean {near}?" if near else "`fluxfast-train -h` lists the commands"
        complain(f"error: there is no command {words[0]!r}, and no config of that name; {answer}")
        return 2
    name = words.pop(0) if words and words[0] in COMMANDS else "train"
    # these libraries' hints are for people who call them directly
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    share_cores()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # it warns that it found no 4-bit kernels for a CPU, which nothing here would call
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(f"fluxfast.cli.{COMMANDS[name][0]}").main(words)


def _is_nothing(word: str) -> bool:
    """Whether a word is no option, no path, and no name that a config beside it completes."""
    path = Path(word)
    is_name = not word.startswith("-") and path.name == word and not path.suffix
    return is_name and not path.exists() and not any(Path().glob(f"{glob.escape(word)}.*"))


def _unread() -> int:
    """Let what is still buffered go nowhere, rather than fail when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _UNREAD


if __name__ == "__main__":
    sys.exit(main())
