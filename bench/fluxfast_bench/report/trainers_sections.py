"""The tables of other trainers' models, accelerated: one row a trainer, and one a case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fluxfast_bench.report.markdown import conditions_line, markdown_table
from fluxfast_bench.report.results import Result, newest_cases

COUNTED = ("blocks", "linears", "adapters")


def by_trainer(stored: Sequence[Result]) -> str:
    """Of the newest run, what of each trainer's cases together runs fused, and what does not."""
    parts = []
    for result, shape, records in newest_cases(stored, "trainers"):
        rows = []
        for trainer in dict.fromkeys(r["contestant"] for r in records):
            cases = [r for r in records if r["contestant"] == trainer and "reason" not in r]
            if not cases:
                continue
            whole = [r for r in cases if r["blocks_fused"] == r["blocks"]]
            rates = [r["ratio"] for r in whole]
            rows.append(
                [
                    trainer,
                    "; ".join(r["mode"] for r in whole),
                    *(_of(cases, what) for what in COUNTED),
                    f"{min(rates):.2f} … {max(rates):.2f}" if rates else "",
                    "; ".join(f"{r['mode']} ({_why(r)})" for r in cases if r not in whole),
                ]
            )
        head = ["", "fused", *COUNTED, "rate, its own is 1", "called as it is"]
        parts.append(_with_conditions(result, shape, records, markdown_table(head, rows, left=2)))
    return "\n\n".join(parts)


def by_case(stored: Sequence[Result]) -> str:
    """Of the newest run, every case."""
    parts = []
    for result, shape, records in newest_cases(stored, "trainers"):
        rows = [
            [
                r["contestant"],
                r["mode"],
                *(_of([r], what) for what in COUNTED),
                f"{r['plain_seconds'] * 1e3:.0f}",
                f"{r['seconds'] * 1e3:.0f}",
                f"{r['ratio']:.2f}",
                f"{r['gradient_error']:.0e}",
                _why(r),
            ]
            for r in records
            if "reason" not in r
        ]
        head = ["", "", *COUNTED, "its own ms", "ms", "rate", "error", "called by their modules"]
        failed = [
            f"{r['contestant']}, {r['mode']} ({r['reason']})" for r in records if "reason" in r
        ]
        note = f"\n\nNot measured: {'; '.join(failed)}." if failed else ""
        table = markdown_table(head, rows, left=2)
        parts.append(_with_conditions(result, shape, records, table) + note)
    return "\n\n".join(parts)


def _of(records: Sequence[dict[str, Any]], what: str) -> str:
    fused, total = (sum(r[key] for r in records) for key in (f"{what}_fused", what))
    return f"{fused} of {total}"


def _why(record: dict[str, Any]) -> str:
    """Why linears are called by their modules; where none is, why a block is not fused."""
    reasons = Counter(record["remains"])
    return "; ".join(reason for reason, _ in reasons.most_common())


def _with_conditions(
    result: Result, shape: str, records: Sequence[dict[str, Any]], table: str
) -> str:
    versions = {r["contestant"]: r["version"] for r in records if r.get("version")}
    named = ", ".join(f"{trainer} {version}" for trainer, version in versions.items())
    return f"{table}\n\n{shape}{f'; {named}' if named else ''}; {conditions_line(result)}."
