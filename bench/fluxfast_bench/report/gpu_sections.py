"""The tables that only a page about one GPU has: compiled, checked, timed kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fluxfast_bench.report.markdown import conditions_line, markdown_table
from fluxfast_bench.report.predicted import comparison_section
from fluxfast_bench.report.results import Result

# the most lines of a step's kernels
KERNELS = 20


def _of(stored: Sequence[Result], kind: str) -> list[Result]:
    return [result for result in stored if result.kind == kind and result.records]


def _faults(records: Sequence[dict[str, Any]]) -> str:
    lines = [f"- {r['case']} {r['contestant']}: {r['reason']}" for r in records if "reason" in r]
    return "\n".join(lines) if lines else "None failed."


def prewarm_section(stored: Sequence[Result]) -> str:
    parts = []
    for result in _of(stored, "prewarm"):
        seconds = sum(r.get("seconds", 0) for r in result.records)
        parts.append(
            f"{len(result.records)} kernels, {seconds:.0f} s of compiling. "
            f"{_faults(result.records)}"
        )
    return "\n\n".join(parts)


def smoke_section(stored: Sequence[Result]) -> str:
    parts = []
    for result in _of(stored, "smoke"):
        checked = [r for r in result.records if "reason" not in r]
        rows = [[r["case"], r["contestant"], f"{r['relative_error']:.2g}"] for r in checked]
        table = markdown_table(["case", "check", "error"], rows, left=2)
        count = f"{len(checked)} of {len(result.records)} right."
        parts += [conditions_line(result), count, _faults(result.records), table]
    return "\n\n".join(parts)


def ceilings_section(stored: Sequence[Result]) -> str:
    rows = []
    for result in _of(stored, "ceilings"):
        for r in result.records:
            rate = f"{r['tflops']:.1f} TFLOP/s" if "tflops" in r else f"{r['gb_s']:.0f} GB/s"
            rows.append(
                [
                    r["case"],
                    r["contestant"],
                    f"{r['seconds'] * 1e6:.1f}" if "seconds" in r else "",
                    rate,
                ]
            )
    return markdown_table(["case", "what", "µs", "rate"], rows, left=2) if rows else ""


def best_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each product on each shape: the fastest tile, and what the table's takes."""
    found = []
    for case, name in dict.fromkeys((r["case"], r["contestant"]) for r in records):
        timed = [
            r for r in records if (r["case"], r["contestant"]) == (case, name) and "reason" not in r
        ]
        if timed:
            best = min(timed, key=lambda r: r["seconds"])
            table = next((r["seconds"] for r in timed if r["table"]), None)
            found.append({**best, "table_seconds": table})
    return found


def untimed(records: Sequence[dict[str, Any]]) -> list[str]:
    """The products that no tile was timed for, and why the first one was not: a line each."""
    timed = {(r["case"], r["contestant"]) for r in records if "reason" not in r}
    reasons = {
        (r["case"], r["contestant"]): r["reason"] for r in reversed(records) if "reason" in r
    }
    return [
        f"{case} {name}: {reason}"
        for (case, name), reason in reasons.items()
        if (case, name) not in timed
    ]


def sweep_section(stored: Sequence[Result]) -> str:
    rows, faults = [], []
    for result in _of(stored, "sweep"):
        faults += [f"- {line}" for line in untimed(result.records)]
        for r in best_of(result.records):
            table = r["table_seconds"]
            gained = "" if table is None else f"{(table - r['seconds']) * r['count'] * 1e3:.2f}"
            before = "" if table is None else f"{table * 1e6:.1f}"
            rows.append(
                [
                    r["case"],
                    r["contestant"],
                    r["mode"],
                    f"{r['seconds'] * 1e6:.1f}",
                    f"{r['tflops']:.1f}",
                    before,
                    gained,
                ]
            )
    head = ["case", "product", "best tile", "µs", "TFLOP/s", "the table's µs", "a step, ms less"]
    parts = [markdown_table(head, rows, left=3)] if rows else []
    return "\n\n".join([*parts, *(["\n".join(faults)] if faults else [])])


def profile_section(stored: Sequence[Result]) -> str:
    parts = []
    for result in _of(stored, "profile"):
        parts.append(conditions_line(result))
        for case, contestant in dict.fromkeys((r["case"], r["contestant"]) for r in result.records):
            of = [r for r in result.records if (r["case"], r["contestant"]) == (case, contestant)]
            step = next(r for r in of if r["mode"] == "step")
            rows = [
                [f"`{r['mode']}`", f"{r['count']:g}", f"{r['seconds'] * 1e3:.2f}"]
                for r in of
                if r["mode"] != "step"
            ]
            told = (
                f"{case}, {contestant}: {step['seconds'] * 1e3:.1f} ms, "
                f"{step['busy_seconds'] * 1e3:.1f} of them in kernels."
            )
            parts.append(f"{told}\n\n{markdown_table(['kernel', 'times', 'ms'], rows[:KERNELS])}")
    return "\n\n".join(parts)


def tests_section(stored: Sequence[Result]) -> str:
    parts = []
    for result in _of(stored, "tests"):
        outcomes = Counter(r["mode"] for r in result.records)
        told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        cut = " of those that there was time for" if result.cut else ""
        parts += [conditions_line(result), f"Tests{cut}: {told}."]
        failed = [r["contestant"] for r in result.records if "reason" in r]
        parts += ["\n".join(f"- `{name}`" for name in failed)] if failed else []
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Sequence[Result]], str]] = {
    "smoke": smoke_section,
    "prewarm": prewarm_section,
    "ceilings": ceilings_section,
    "sweep": sweep_section,
    "profile": profile_section,
    "tests": tests_section,
    "predictions": comparison_section,
}
