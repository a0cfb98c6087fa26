"""The tables of other trainers, accelerated: of their models, a row a trainer and a row a case; and
of their scripts, a row a trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fluxfast_bench.report.markdown import (
    conditions_line,
    conditions_of,
    machine_of,
    markdown_table,
)
from fluxfast_bench.report.results import Result, newest_cases
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.trainers.case import was_measured

COUNTED = ("blocks", "linears", "adapters")
TITLES = {
    "diffusers": "diffusers + PEFT",
    "simpletuner": "SimpleTuner",
    "onetrainer": "OneTrainer",
    "comfyui": "ComfyUI",
}


def by_trainer(stored: Sequence[Result]) -> str:
    """Of the newest run, what of each trainer's cases together runs fused, and what does not."""
    parts = []
    for result, shape, records in newest_cases(stored, "trainers"):
        rows = []
        for trainer in dict.fromkeys(r["contestant"] for r in records):
            cases = [r for r in records if r["contestant"] == trainer and was_measured(r)]
            whole = [r for r in cases if r["blocks_fused"] == r["blocks"]]
            rates = [r["ratio"] for r in whole]
            if cases:
                rows.append(
                    [
                        TITLES.get(trainer, trainer),
                        _grouped([r["mode"] for r in whole]),
                        "; ".join(f"{r['mode']}: {_why(r)}" for r in cases if r not in whole),
                        *(_of(cases, what) for what in COUNTED),
                        f"{min(rates):.2f} … {max(rates):.2f}" if rates else "",
                    ]
                )
        head = ["", "fused", "called as it is, and why", *COUNTED, "rate, its own is 1"]
        made = f"{_conditions(shape, records)}; {conditions_of(result)}."
        parts.append(f"{markdown_table(head, rows, left=3)}\n\n{made}")
    return "\n\n".join(parts)


def by_case(stored: Sequence[Result]) -> str:
    """Of the newest run, every case."""
    parts = []
    for result, shape, records in newest_cases(stored, "trainers"):
        rows = [
            [
                TITLES.get(r["contestant"], r["contestant"]),
                r["mode"],
                _why(r),
                *(_of([r], what) for what in COUNTED),
                f"{r['plain_seconds'] * 1e3:.0f}",
                f"{r['seconds'] * 1e3:.0f}",
                f"{r['ratio']:.2f}",
                f"{r.get('gradient_error', r['output_error']):.0e}",
            ]
            for r in records
            if was_measured(r)
        ]
        head = ["", "", "why not fused", *COUNTED, "its own ms", "ms", "rate", "error"]
        failed = [
            f"{r['contestant']}, {r['mode']} ({r['reason']})" for r in records if "reason" in r
        ]
        note = f" Not measured: {'; '.join(failed)}." if failed else ""
        made = f"{_conditions(shape, records)}; {conditions_line(result)}.{note}"
        parts.append(f"{markdown_table(head, rows, left=3)}\n\n{made}")
    return "\n\n".join(parts)


def scripts(stored: Sequence[Result]) -> str:
    """What each trainer's own script has trained in its newest run, and whether it is the same."""
    newest = {
        record["contestant"]: result
        for result in sorted(stored, key=lambda r: r.date)
        if result.kind == "loops"
        for record in result.records
    }
    rows, failed, runs = [], [], dict[str, list[str]]()
    for trainer, result in newest.items():
        records = [r for r in result.records if r["contestant"] == trainer]
        # older results have those of the Python that ran the command, and no trainer's
        installed = result.data.get("installed")
        made = conditions_of(result) if installed is None else machine_of(result)
        own = _of_packages((installed or {}).get(trainer, {}))
        runs.setdefault(made, []).extend(f"{each}{own}" for each in _versions(records))
        failed += [f"{trainer}, {r['mode']} ({r['reason']})" for r in records if "reason" in r]
        if ran := [r for r in records if "reason" not in r]:
            rows.append(
                [
                    TITLES.get(trainer, trainer),
                    ", ".join(r["mode"] for r in ran),
                    _of(ran, "calls"),
                    f"{max(r['loss_error'] for r in ran):.0e}",
                    f"{max(r['weights_error'] for r in ran):.0e}",
                ]
            )
    if not rows:
        return ""
    head = ["", "trained", "calls of blocks fused", "loss differs by", "the adapter by"]
    made = " ".join(f"{', '.join(versions)}: {run}." for run, versions in runs.items())
    note = f" Did not run: {'; '.join(failed)}." if failed else ""
    return f"{markdown_table(head, rows, left=2)}\n\n{made}{note}"


def _of_packages(versions: dict[str, str]) -> str:
    """The versions of a trainer's packages, to stand behind its own."""
    words = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f" ({words})" if words else ""


def _grouped(modes: Sequence[str]) -> str:
    """What trains, each with the ways in which it does: "LoRA (checkpointing), DoRA"."""
    ways: dict[str, list[str]] = {}
    for mode in modes:
        adapter, _, way = mode.partition(", ")
        # a way may have several parts
        ways.setdefault(adapter, []).extend([way.replace(", ", " and ")] if way else [])
    return ", ".join(
        f"{adapter} ({', '.join(found)})" if found else adapter for adapter, found in ways.items()
    )


def _of(records: Sequence[dict[str, Any]], what: str) -> str:
    fused, total = (sum(r[key] for r in records) for key in (f"{what}_fused", what))
    return f"{fused} of {total}"


def _why(record: dict[str, Any]) -> str:
    """Why linears are called by their modules, the most frequent reason first."""
    return "; ".join(reason for reason, _ in Counter(record["remains"]).most_common())


def _conditions(shape: str, records: Sequence[dict[str, Any]]) -> str:
    """The shape, and the version of each checkout."""
    tokens, batch = SHAPES[shape].tokens, SHAPES[shape].batch
    return ", ".join([f"{shape}: {tokens} tokens, batch {batch}", *_versions(records)])


def _versions(records: Sequence[dict[str, Any]]) -> list[str]:
    versions = {r["contestant"]: r["version"] for r in records if r.get("version")}
    return [f"{TITLES.get(trainer, trainer)} {version}" for trainer, version in versions.items()]
