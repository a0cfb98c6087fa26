"""`fluxfast-bench`: the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fluxfast import __version__

# command: (module of fluxfast_bench, one line of help); a module is imported when its command runs
COMMANDS = {
    "aot": ("aot", "compile every Triton kernel for every GPU, without one: registers, spills, shared memory"),
}


def usage() -> str:
    lines = ["fluxfast-bench: measure fluxfast's kernels and training step", ""]
    lines += [f"  fluxfast-bench {name:8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version; `fluxfast-bench COMMAND --help` says more"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a bad result or request, 2 for a command line that can't be read."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "--version":
        print(__version__)
        return 0
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"fluxfast_bench.{COMMANDS[words[0]][0]}").main(words[1:])
    asked = bool(words) and words[0] in ("-h", "--help", "help")
    print(usage(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
