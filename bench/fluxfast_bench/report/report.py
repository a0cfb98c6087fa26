"""`fluxfast-bench report`: the tables of README.md and bench/README.md, and the plots.

They are made from stored results; no figure in them is typed by hand. A table stands between
`<!-- bench:NAME -->` and `<!-- /bench -->`. For each device and case it shows the newest run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fluxfast.files import write_atomic
from fluxfast_bench.main import COMMANDS
from fluxfast_bench.report import (
    check,
    counted_sections,
    gpu_sections,
    measured_sections,
    plots,
    results,
    targets,
)
from fluxfast_bench.report.headline import headline
from fluxfast_bench.report.markdown import markdown_table
from fluxfast_bench.report.results import Result
from fluxfast_bench.report.verdict import UNMEASURED
from fluxfast_bench.run import told_written

DOCUMENTS = (Path("README.md"), Path("bench/README.md"))
MARKED = re.compile(r"(<!-- bench:([a-z]+) -->\n).*?(<!-- /bench -->)", flags=re.DOTALL)
# the markers of what is neither measured nor counted by one command alone
RESULTS, COMMAND_TABLE, PLOTS = "results", "commands", "plots"
# of the tables about one GPU, those that a document shows
ON_A_GPU = ("smoke", "profile", "tests")
# every marker that there may be
NAMES = (
    *(RESULTS, COMMAND_TABLE, PLOTS),
    *measured_sections.SECTIONS,
    *counted_sections.SECTIONS,
    *ON_A_GPU,
)


def pictures(root: Path, document: Path) -> str:
    """Links to the plots, from where the document lies."""
    found = sorted(root.glob(f"*/{plots.STEP}")) + sorted(root.glob(f"*/{plots.SCALING}"))
    links = [(path, Path(os.path.relpath(path, document.parent)).as_posix()) for path in found]
    return "\n\n".join(f"![{path.stem} on {path.parent.name}]({link})" for path, link in links)


def command_table() -> str:
    """Every command, in the folder that it lies in."""
    rows = [
        [f"`{name}`", f"`{module.partition('.')[0]}/`", words]
        for name, (module, words) in COMMANDS.items()
    ]
    return markdown_table(["`fluxfast-bench …`", "in", "what it does"], rows, left=3)


def render(text: str, stored: Sequence[Result], root: Path, document: Path) -> str:
    """`text`, the document's, with every marked table made anew.

    Raises ValueError for a marker that nothing stands behind.
    """

    def made(name: str) -> str:
        if name == RESULTS:
            return headline(stored, root)
        if name == COMMAND_TABLE:
            return command_table()
        if name == PLOTS:
            return pictures(root, document)
        if name in counted_sections.SECTIONS:
            return counted_sections.section(name, root)
        sections = measured_sections.SECTIONS | gpu_sections.SECTIONS
        return sections[name](stored)

    def filled(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in NAMES:
            raise ValueError(
                f"{opening.strip()}: there is no such table; there are {', '.join(NAMES)}"
            )
        return f"{opening}\n{made(name) or 'Not measured yet.'}\n\n{closing}"

    return MARKED.sub(filled, text)


def summary(
    stored: Sequence[Result],
    links: str,
    wanted: dict[str, Any] | None,
    counted: dict[str, list[dict[str, Any]]],
) -> str:
    """One page: every table of what was measured, and which targets were met or missed."""
    parts = ["# fluxfast-bench"]
    for name, section in (measured_sections.SECTIONS | gpu_sections.SECTIONS).items():
        if text := section(stored):
            parts.append(f"## {name}\n\n{text}")
    if links:
        parts.append(links)
    if wanted is not None:
        rows = [
            [line.name, line.where, line.wanted, line.found, line.verdict]
            for line in check.verdicts_of(stored, wanted, counted)
            if line.verdict != UNMEASURED
        ]
        parts.append(
            "## targets\n\n"
            + markdown_table(["figure", "where", "wanted", "found", ""], rows, left=2)
        )
    return "\n\n".join(parts) + "\n"


def write_summary(path: Path, root: Path, targets_path: Path) -> None:
    """The page of everything that is stored under `root`, with its plots."""
    stored = results.read_all(root)
    plots.draw(stored, root)
    wanted = targets.read(targets_path) if targets_path.exists() else None
    page = summary(stored, pictures(root, path), wanted, results.read_counted(root))
    write_atomic(path, page.encode())


def rendered(documents: Sequence[Path], root: Path, *, draw: bool) -> dict[Path, tuple[str, str]]:
    """Each document's text, and what it is made. Raises ValueError for one without tables."""
    stored, texts = results.read_all(root), {}
    for document in documents:
        before = document.read_text(encoding="utf-8")
        if not MARKED.search(before):
            places = ", ".join(f"<!-- bench:{name} -->" for name in NAMES)
            raise ValueError(f"{document}: has no place for a table, one of {places}")
        texts[document] = before
    if draw:
        plots.draw(stored, root)
    return {path: (text, render(text, stored, root, path)) for path, text in texts.items()}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench report",
        description=(
            "Make the tables of README.md and bench/README.md, and the plots, from stored "
            "results. Exit status 1: --check found a difference."
        ),
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="+",
        default=DOCUMENTS,
        metavar="FILE",
        help=f"default: {' '.join(map(str, DOCUMENTS))}",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing: say whether the files are what would be made",
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="write one page there, and leave the others alone",
    )
    parser.add_argument(
        "--targets", type=Path, default=targets.TARGETS, help="for --summary (default: %(default)s)"
    )
    options, console = parser.parse_args(argv), Console()
    try:
        if options.summary is not None:
            write_summary(options.summary, options.results, options.targets)
            told_written(options.summary, console)
            return 0
        texts = rendered(options.readme, options.results, draw=not options.check)
    except (ValueError, FileNotFoundError) as error:
        print(f"fluxfast-bench report: {error}", file=sys.stderr)
        return 1
    differing = {path: after for path, (before, after) in texts.items() if after != before}
    for path, after in differing.items():
        if options.check:
            print(f"{path} is not what `fluxfast-bench report` makes: run it", file=sys.stderr)
        else:
            write_atomic(path, after.encode())
            told_written(path, console)
    if not differing:
        console.print("every table is what the results say", highlight=False)
    return int(options.check and bool(differing))
