"""`fluxfast-bench report`: the README's tables and the plots, made from stored results; no figure
in them is typed by hand.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`. For each device and case it is
that of the newest run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxfast.files import write_atomic
from fluxfast_bench import check, plots, proofs, report_gpu, results, targets
from fluxfast_bench.proofs import markdown_table
from fluxfast_bench.results import Result

# the marker behind which the plots stand
PLOTS = "plots"
MARKED = re.compile(r"(<!-- bench:([a-z]+) -->\n).*?(<!-- /bench -->)", flags=re.DOTALL)


def newest_cases(
    stored: Sequence[Result], kind: str
) -> list[tuple[Result, str, list[dict[str, Any]]]]:
    """(run, case, records) of the newest run of each case on each device."""
    found: dict[tuple[str, str], tuple[Result, str, list[dict[str, Any]]]] = {}
    for result in sorted(stored, key=lambda r: r.date):
        if result.kind != kind:
            continue
        for case in dict.fromkeys(record["case"] for record in result.records):
            found[result.device, case] = (
                result,
                case,
                [r for r in result.records if r["case"] == case],
            )
    return [found[key] for key in sorted(found)]


def conditions_line(result: Result) -> str:
    """Under what a table was measured."""
    found = result.data["conditions"]
    gpu = found.get("gpu", {})
    words = [found["device"]]
    if gpu:
        words.append(
            f"driver {gpu['driver_version']}, SM clock {gpu['clocks.sm']} of "
            f"{gpu['clocks.max.sm']} MHz"
        )
    words += [
        f"{name} {found['versions'][name]}"
        for name in ("torch", "diffusers", "peft")
        if name in found["versions"]
    ]
    cut = " (cut short)" if result.cut else ""
    return f"{', '.join(words)}; {found['commit']}, {found['date'][:10]}: `{found['command']}`{cut}"


def step_section(stored: Sequence[Result]) -> str:
    parts = []
    for result, case, records in newest_cases(stored, "step"):
        measured = sorted((r for r in records if "reason" not in r), key=lambda r: r["seconds"])
        if not measured:
            continue
        first = next(r for r in records if "reason" not in r)
        best = (
            min(r["seconds"] for r in measured if not r["ours"])
            if any(not r["ours"] for r in measured)
            else None
        )
        rows = [
            [
                f"**{r['title']}**" if r["ours"] else r["title"],
                r["recompute"],
                f"{r['seconds'] * 1e3:.1f}",
                f"{r['low'] * 1e3:.1f} … {r['high'] * 1e3:.1f}",
                f"{best / r['seconds']:.2f}" if best is not None else "",
                f"{r['peak_gib']:.1f}" if "peak_gib" in r else "",
                f"{r['floor_share']:.0%}" if "floor_share" in r else "",
            ]
            for r in measured
        ]
        head = [
            "",
            "recompute",
            "ms a step",
            "10 … 90 %",
            "rate, fastest peer 1",
            "peak GiB",
            "of the floor's rate",
        ]
        where = (
            f"**{case}**: {first['tokens']} tokens, batch {first['batch']}, rank "
            f"{first['rank']}, {first['optimizer']}."
        )
        table = markdown_table(head, rows, left=2)
        failed = [f"{r['contestant']} ({r['reason']})" for r in records if "reason" in r]
        note = f"\n\nNot measured: {', '.join(failed)}." if failed else ""
        parts.append(f"{where} {conditions_line(result)}\n\n{table}{note}")
    return "\n\n".join(parts)


def pictures(root: Path, document: Path) -> str:
    """Links to the plots, from where the document lies."""
    found = sorted(root.glob(f"*/{plots.STEP}")) + sorted(root.glob(f"*/{plots.SCALING}"))
    links = [(path, Path(os.path.relpath(path, document.parent)).as_posix()) for path in found]
    return "\n\n".join(f"![{path.stem} on {path.parent.name}]({link})" for path, link in links)


def ops_section(stored: Sequence[Result]) -> str:
    parts: dict[str, list[list[str]]] = {}
    lines: dict[str, str] = {}
    for result, case, records in newest_cases(stored, "ops"):
        for record in (r for r in records if r["ours"] and "reason" not in r):
            rate = (
                f"{record['tflops']:.1f} TFLOP/s"
                if "tflops" in record
                else f"{record['gb_s']:.0f} GB/s"
            )
            ratios = [
                f"{record['ratios'][name]:.2f}" if name in record["ratios"] else ""
                for name in ("eager", "compile")
            ]
            share = f"{record['ceiling_share']:.0%}"
            names = [case, record["mode"]]
            parts.setdefault(result.device, []).append(
                [*names, f"{record['seconds'] * 1e6:.1f}", rate, share, *ratios]
            )
            lines[result.device] = conditions_line(result)
    head = [
        "op and shape",
        "directions",
        "µs",
        "rate",
        "of the ceiling",
        "rate, eager 1",
        "rate, torch.compile 1",
    ]
    return "\n\n".join(
        f"{lines[device]}\n\n{markdown_table(head, rows, left=2)}" for device, rows in parts.items()
    )


def startup_section(stored: Sequence[Result]) -> str:
    parts = []
    keys = ("load_seconds", "copy_seconds", "seconds", "load_rss_gib", "peak_rss_gib")
    head = ["", "loaded s", "a copy takes s", "first step s", "loading took GiB", "peak RSS GiB"]
    for result, case, records in newest_cases(stored, "startup"):
        rows = [
            [r["contestant"], *(f"{r[key]:.2f}" for key in keys)]
            for r in records
            if "reason" not in r
        ]
        parts.append(
            f"A checkpoint of {case}. {conditions_line(result)}\n\n{markdown_table(head, rows)}"
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Sequence[Result]], str]] = {
    "step": step_section,
    "ops": ops_section,
    "startup": startup_section,
}


# every marker that there may be
NAMES = (*SECTIONS, *proofs.SECTIONS, PLOTS)


def render(text: str, stored: Sequence[Result], root: Path, links: str) -> str:
    """`text` with every marked table made anew. Raises ValueError for a marker that nothing stands
    behind.
    """

    def filled(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in NAMES:
            raise ValueError(
                f"{opening.strip()}: there is no such table; there are {', '.join(NAMES)}"
            )
        if name in proofs.SECTIONS:
            made = proofs.section(name, root)
        else:
            made = links if name == PLOTS else SECTIONS[name](stored)
        return f"{opening}\n{made or 'Not measured yet.'}\n\n{closing}"

    return MARKED.sub(filled, text)


def summary(
    stored: Sequence[Result],
    links: str,
    wanted: dict[str, Any] | None,
    counted: dict[str, list[dict[str, Any]]],
) -> str:
    """One page: every table, and what of the targets was measured."""
    parts = ["# fluxfast-bench"]
    for name, section in (SECTIONS | report_gpu.SECTIONS).items():
        if text := section(stored):
            parts.append(f"## {name}\n\n{text}")
    if links:
        parts.append(links)
    if wanted is not None:
        rows = [
            [line.name, line.where, line.wanted, line.found, line.verdict]
            for line in check.verdicts_of(stored, wanted, counted)
            if line.verdict != check.UNMEASURED
        ]
        parts.append(
            "## targets\n\n"
            + markdown_table(["figure", "where", "wanted", "found", ""], rows, left=2)
        )
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench report",
        description=(
            "Make the README's tables and the plots from stored results. Exit status 1: --check "
            "found a difference."
        ),
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="default: %(default)s"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing: say whether the README is what would be made",
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="write one page there, and leave the README alone",
    )
    parser.add_argument(
        "--targets", type=Path, default=targets.TARGETS, help="for --summary (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        stored = results.read_all(options.results)
        if options.summary is not None:
            plots.draw(stored, options.results)
            wanted = targets.read(options.targets) if options.targets.exists() else None
            counted = results.read_counted(options.results)
            write_atomic(
                options.summary,
                summary(
                    stored, pictures(options.results, options.summary), wanted, counted
                ).encode(),
            )
            return 0
        before = options.readme.read_text(encoding="utf-8")
        if not MARKED.search(before):
            places = ", ".join(f"<!-- bench:{name} -->" for name in NAMES)
            raise ValueError(f"{options.readme}: has no place for a table, one of {places}")
        if not options.check:
            plots.draw(stored, options.results)
        after = render(before, stored, options.results, pictures(options.results, options.readme))
    except (ValueError, FileNotFoundError) as error:
        print(f"fluxfast-bench report: {error}", file=sys.stderr)
        return 1
    if options.check:
        if after != before:
            print(
                f"{options.readme} is not what `fluxfast-bench report` makes: run it",
                file=sys.stderr,
            )
        return int(after != before)
    write_atomic(options.readme, after.encode())
    return 0
