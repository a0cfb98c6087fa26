"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console

from fluxfast.text import wrong_choice
from fluxfast_bench.shapes import SHAPES


def wide_console() -> Console:
    """Standard output; where that is no terminal, with room for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def print_faults(lines: Sequence[str], console: Console) -> int:
    """Prints what is wrong; returns the exit status."""
    for line in lines:
        console.print(line, style="red", markup=False, soft_wrap=True)
    return 1 if lines else 0


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """--device and --shapes, as every command has them."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--shapes",
        metavar="S,…",
        help=f"of {', '.join(SHAPES)} (default: 1024px-b1,512px-b1; on a CPU small-b2)",
    )


def chosen_device(text: str | None) -> torch.device:
    """Raises ValueError for a device that isn't there."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {text}: this PyTorch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def chosen(
    option: str, text: str | None, allowed: Sequence[str], default: Sequence[str] | None = None
) -> list[str]:
    """The names in a comma-separated option; `default`, or all allowed ones, where it is absent.

    Raises ValueError naming what isn't allowed.
    """
    names = list(allowed if default is None else default) if text is None else text.split(",")
    unknown = [wrong_choice(option, name, allowed) for name in names if name not in allowed]
    if unknown:
        raise ValueError("\n".join(unknown))
    return names
