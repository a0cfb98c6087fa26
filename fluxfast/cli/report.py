"""`fluxfast-train report OUT`: write one HTML page about a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.complain import complain

HELP = """fluxfast-train report OUT

Write OUT/report.html, one page about the run in its output folder OUT: its
state and config, the course of its losses, learning rate, memory and times, its
validation images, datasets and versions. The page needs no network and no other
file. A run writes it at its end; this command writes it of one that is running
or was stopped."""


def main(words: Sequence[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print(HELP)
        return 0 if words in (["-h"], ["--help"]) else 2
    # torch comes with the reader of checkpoints, and takes a second to import
    from fluxfast.train.report import write_report

    try:
        path = write_report(Path(words[0]))
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return 1
    print(path)
    return 0
