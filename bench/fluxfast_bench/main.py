"""`fluxfast-bench`: the command line."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from fluxfast import __version__
from fluxfast.text import command_list, nearest
from fluxfast.threads import share_cores

# command: (module of fluxfast_bench, one line of help); a module is imported when its command runs
COMMANDS = {
    "ops": ("ops.timings", "time each fused op beside eager PyTorch and torch.compile"),
    "step": (
        "step.step",
        "time whole training steps beside the peers: diffusers + PEFT, quanto, bitsandbytes, "
        "SDNQ, torchao",
    ),
    "startup": ("step.startup", "time and memory from a checkpoint to the first step"),
    "prewarm": (
        "counted.prewarm",
        "compile what steps launch into Triton's cache, in many processes; no GPU is needed",
    ),
    "ceilings": (
        "ops.ceilings",
        "time copies, matrix products and attention at a step's shapes, by PyTorch's own kernels",
    ),
    "smoke": (
        "ops.smoke",
        "hold every kernel that a step launches against fp32: each format, products, graphs, "
        "attention",
    ),
    "tests": ("ops.device_tests", "run tests in forked processes, each outcome stored as it comes"),
    "sweep": ("ops.sweep", "time a step's wide products with each tile that they could have"),
    "profile": (
        "step.profile",
        "sum up the kernels of a step: how often, how long, and the time between them",
    ),
    "aot": (
        "counted.aot",
        "compile every Triton kernel for every GPU, without one: registers, spills, shared memory",
    ),
    "formats": (
        "ops.formats",
        "error of each storage format beside optimum-quanto's and bitsandbytes'",
    ),
    "counts": (
        "counted.counts",
        "count what a full-size step launches and moves, beside diffusers + PEFT; no GPU is needed",
    ),
    "host": (
        "step.host",
        "time the Python of a step, with launches that do nothing; no GPU is needed",
    ),
    "vram": (
        "counted.vram",
        "the memory of a full-size step for every preset, beside its target and the plan's; no "
        "GPU is needed",
    ),
    "predict": (
        "counted.predict",
        "predict a step's time on GPUs that are not here, beside the quickstart's; or take the "
        "rates that a GPU has measured",
    ),
    "adapters": (
        "counted.adapters",
        "predict what a step costs with LoKr and DoRA beside LoRA; no GPU is needed",
    ),
    "trainers": (
        "trainers.trainers",
        "run other trainers' own models and adapters plain and accelerated: what is fused, "
        "whether results are equal, and how fast",
    ),
    "loops": (
        "loops.loops",
        "run other trainers' own scripts on tiny models, plain and by `python -m fluxfast.dropin`: "
        "whether they train the same",
    ),
    "report": ("report.report", "make the tables of the READMEs and the plots from stored results"),
    "check": (
        "report.check",
        "hold stored results against bench/targets.toml and the runs before them",
    ),
    "quality": (
        "quality.quality",
        "teach the toy base the demo's subject in every precision, attention, adapter and policy: "
        "the loss and the drawings' score, over several seeds",
    ),
    "make-checkpoint": (
        "step.make_checkpoint",
        "write a FLUX.1-shaped transformer with random weights, of any size up to 24 GB",
    ),
}


def usage() -> str:
    listed = command_list({name: text for name, (_, text) in COMMANDS.items()})
    return (
        "fluxfast-bench: measure fluxfast's kernels and training step\n\n"
        f"{listed}\n\n`fluxfast-bench COMMAND --help` says more; --version"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    That is 0, or 1 for a bad result or request, or 2 for a command line that can't be read.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "--version":
        print(__version__)
        return 0
    if words and words[0] in COMMANDS:
        # what our libraries advise their own users to do is no concern of ours
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        share_cores()
        # it warns that it found no 4-bit kernels for a CPU, which nothing here would call
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return importlib.import_module(f"fluxfast_bench.{COMMANDS[words[0]][0]}").main(words[1:])
    asked = bool(words) and words[0] in ("-h", "--help", "help")
    if words and not asked:
        near = nearest(words[0], COMMANDS)
        question = "" if near is None else f" Did you mean {near}?"
        print(f"fluxfast-bench: there is no command {words[0]!r}.{question}\n", file=sys.stderr)
    print(usage(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
