"""The tables of what a device measured: `step`, `ops`, `startup`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fluxfast_bench.report import trainers_sections
from fluxfast_bench.report.markdown import conditions_line, markdown_table
from fluxfast_bench.report.results import Result, newest_cases
from fluxfast_bench.timing import share_told


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
                share_told(r, "floor_share"),
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
            share = share_told(record, "ceiling_share")
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
        measured = [r for r in records if "reason" not in r]
        if case == "imports":
            rows = [[r["contestant"], f"{r['import_seconds']:.2f}"] for r in measured]
            table = (
                f"{conditions_line(result)}\n\n{markdown_table(['imports', 'processor s'], rows)}"
            )
            parts.append(f"What a process imports. {table}")
            continue
        rows = [[r["contestant"], *(f"{r[key]:.2f}" for key in keys)] for r in measured]
        parts.append(
            f"A checkpoint of {case}. {conditions_line(result)}\n\n{markdown_table(head, rows)}"
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Sequence[Result]], str]] = {
    "step": step_section,
    "ops": ops_section,
    "startup": startup_section,
    "trainers": trainers_sections.by_trainer,
    "trainercases": trainers_sections.by_case,
    "loops": trainers_sections.scripts,
}
