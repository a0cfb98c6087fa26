"""`fluxfast-bench step`: a whole optimisation step, beside the peers, in turn, in one run.

Forward, backward, clip, optimiser, zero; warm; on random weights, which have no influence on speed. All contestants of a case
have the same shape, adapters, optimiser and recompute policy, unless a policy is named with a contestant (NAME:POLICY). The
first one named is the anchor: it takes part in every process, and what doesn't fit beside the others is compared through it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from fluxfast.quant import FORMATS
from fluxfast_bench import results, worker
from fluxfast_bench.cases import SHAPES, default_shapes
from fluxfast_bench.conditions import conditions, installed
from fluxfast_bench.floor import RECOMPUTE, floor_seconds, step_work
from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.runner import OPTIMIZERS
from fluxfast_bench.timing import stats
from fluxfast_bench.worker import CONTESTANTS, Entry, Plan, entry_of

CPU_DEFAULT = (
    *("diffusers", "fluxfast", *(f"fluxfast-{name}" for name in FORMATS)),
    *("fluxfast+int8", "fluxfast-int8+int8", "fluxfast-int4+int8", "fluxfast-nf4+int8", "fluxfast-fp8_e4m3+e4m3"),
)
# the targets' pairs first, so that a run that is cut has them
GPU_DEFAULT = (
    *("diffusers-compile", "fluxfast-int8+int8", "diffusers", "fluxfast", "quanto-int8", "fluxfast-int8+int8:none"),
    *("fluxfast-int8+int8+graphs", "sdnq-int8", "fluxfast-int8+int8+tread", "bnb-nf4", "fluxfast-nf4+int8"),
    *("fluxfast+int8", "fluxfast-int4+int8", "fluxfast-int4+int8+streamed"),
    *("fluxfast-fp8_e4m3+e4m3", "torchao-fp8", "torchao-int8", "quanto-int4", "quanto-int2"),
)


@dataclass
class Outcome:
    """What is known of an entry: figures once it was ready, step times by turn, or why there are none."""

    entry: Entry
    figures: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    # the anchor's turns of the same process
    anchor: list[list[float]] = field(default_factory=list)
    reason: str | None = None

    @property
    def slowness(self) -> float:
        """Time against the anchor's: the median over turns that followed one another."""
        return median(median(own) / median(other) for own, other in zip(self.rounds, self.anchor, strict=False))


class Case:
    """One shape: its contestants and what came of them."""

    def __init__(self, plan: Plan, entries: Sequence[Entry], *, apart: bool, limit: float) -> None:
        self.plan, self.apart, self.limit = plan, apart, limit
        self.outcomes = {entry.key: Outcome(entry) for entry in entries}

    def measure(self) -> list[Outcome]:
        """Everything that can be measured, in as many processes as it takes."""
        device = torch.device(self.plan.device)
        for outcome in self.outcomes.values():
            outcome.reason = outcome.entry.contestant.missing(device)
        able = [key for key, outcome in self.outcomes.items() if outcome.reason is None]
        anchor = able[0] if able else None
        waiting = able[1:]
        while anchor is not None and (waiting or not self.outcomes[anchor].rounds):
            before = list(waiting)
            waiting = self._group(anchor, waiting)
            if self.outcomes[anchor].reason is not None:
                # the next one takes its place
                anchor = waiting.pop(0) if waiting else None
            elif waiting == before and waiting:
                self._alone(anchor, waiting.pop(0))
        return list(self.outcomes.values())

    def _run(self, keys: list[str]) -> Iterable[worker.Event]:
        if self.apart:
            return worker.run_apart("measure", keys, self.plan, limit=self.limit)
        return worker.run("measure", keys, self.plan)

    def _group(self, anchor: str, keys: list[str]) -> list[str]:
        """One process; returns the keys that have to be measured in another."""
        turns: dict[str, list[list[float]]] = {key: [] for key in [anchor, *keys]}
        started, later, settled = anchor, [], set()
        for event in self._run([anchor, *keys]):
            kind, *rest = event
            if kind == "start":
                (started,) = rest
            elif kind == "ready":
                self.outcomes[rest[0]].figures = rest[1]
                settled.add(rest[0])
            elif kind == "failed":
                self.outcomes[rest[0]].reason = rest[1]
                settled.add(rest[0])
            elif kind == "later":
                later.append(rest[0])
            elif kind == "round":
                turns[rest[0]].append(rest[1])
            elif kind == "died" and started not in settled:
                self.outcomes[started].reason = rest[0]
            elif kind == "died" and self.outcomes[started].reason is None and not turns[started]:
                # everybody was ready: the first turn of one of them did it
                culprit = next(key for key in [anchor, *keys] if key in settled and not turns[key])
                self.outcomes[culprit].reason = rest[0]
        self._keep(anchor, turns)
        return [key for key in keys if self.outcomes[key].reason is None and not turns[key]]

    def _keep(self, anchor: str, turns: dict[str, list[list[float]]]) -> None:
        for key, rounds in turns.items():
            if rounds:
                self.outcomes[key].rounds += rounds
                self.outcomes[key].anchor += turns[anchor][: len(rounds)]

    def _alone(self, anchor: str, key: str) -> None:
        """What doesn't fit beside the anchor: processes of its own and of the anchor's, in turn."""
        outcome = self.outcomes[key]
        for _ in range(2):
            turns: list[list[float]] = []
            for one in (anchor, key):
                times = [event[2] for event in self._alone_events(one) if event[0] == "round"]
                turns.append([second for turn in times for second in turn])
            if outcome.reason is not None or not all(turns):
                outcome.reason = outcome.reason or "did not fit in memory"
                return
            outcome.anchor.append(turns[0])
            outcome.rounds.append(turns[1])

    def _alone_events(self, key: str) -> Iterable[worker.Event]:
        for event in self._run([key]):
            if event[0] in ("failed", "died"):
                self.outcomes[key].reason = event[-1]
            elif event[0] == "ready":
                self.outcomes[key].figures = event[2]
            yield event


def record_of(outcome: Outcome, outcomes: Sequence[Outcome], plan: Plan, ceilings: dict[str, float]) -> dict[str, Any]:
    """A contestant's line: conditions, figures, and for one of ours the ratio to every other contestant's time."""
    entry, contestant, shape = outcome.entry, outcome.entry.contestant, SHAPES[plan.shape]
    record: dict[str, Any] = {
        "case": shape.name,
        "contestant": entry.key,
        "title": contestant.title,
        "ours": contestant.ours,
        "storage": contestant.storage if plan.device != "cpu" or contestant.storage != "bf16" else "fp32",
        "recompute": entry.recompute,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "rank": plan.rank,
        "optimizer": plan.optimizer,
    }
    if outcome.reason is not None or not outcome.rounds:
        return record | {"reason": outcome.reason or "was not reached"}
    timed = stats([second for turn in outcome.rounds for second in turn])
    record |= timed.as_record() | outcome.figures
    itemsize = plan.setup(entry.recompute).dtype.itemsize
    work = step_work(
        shape, entry.recompute, rank=plan.rank, itemsize=itemsize, codes=contestant.compute != "float", route=contestant.route
    )
    if ceilings:
        floor = floor_seconds(work, ceilings, contestant.compute)
        record |= {"floor_seconds": round(floor, 6), "floor_share": round(floor / timed.seconds, 4)}
    if contestant.ours:
        others = [other for other in outcomes if other is not outcome and other.reason is None and other.rounds]
        record["ratios"] = {other.entry.key: round(other.slowness / outcome.slowness, 4) for other in others}
    return record


def table_of(records: Sequence[dict[str, Any]], case: str) -> Table:
    table = Table(title=case)
    table.add_column("contestant", no_wrap=True)
    for column in ("steps/s", "ms", "10 % … 90 %", "peak GiB", "floor", "error"):
        table.add_column(column, justify="right")
    for record in records:
        if "reason" in record:
            table.add_row(record["contestant"], *[""] * 5, Text(record["reason"], style="red"))
            continue
        table.add_row(
            record["contestant"],
            f"{1 / record['seconds']:.3f}",
            f"{record['seconds'] * 1e3:.1f}",
            f"{record['low'] * 1e3:.1f} … {record['high'] * 1e3:.1f}",
            f"{record['peak_gib']:.2f}" if "peak_gib" in record else "-",
            f"{record['floor_share']:.1%}" if "floor_share" in record else "-",
            f"{record['relative_error']:.1e}",
        )
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench step",
        description="Measure whole training steps, beside the peers. Exit status 1: one of ours is wrong or fails.",
    )
    add_case_options(parser)
    parser.add_argument("--contestants", metavar="C,…", help=f"NAME or NAME:POLICY, of {', '.join(CONTESTANTS)}")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="policy where none is named (default: full; on a CPU none)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA on every linear of the blocks (default: %(default)s)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="default: adamw8bit on a GPU that has bitsandbytes, else AdamW")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant gets (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of steps at each turn (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds without an answer that end a contestant")
    parser.add_argument("--one-process", action="store_true", help="measure in this process, for debuggers")
    parser.add_argument("--torch-profile", metavar="DIR", help="leave a trace of two steps of each contestant there")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def default_optimizer(device: torch.device) -> str:
    return "adamw8bit" if device.type == "cuda" and installed("bitsandbytes") else "torch-adamw"


def entries_of(options: argparse.Namespace, device: torch.device) -> list[Entry]:
    recompute = options.recompute or ("none" if device.type == "cpu" else "full")
    default = CPU_DEFAULT if device.type == "cpu" else GPU_DEFAULT
    texts = options.contestants.split(",") if options.contestants else default
    chosen("--contestants", ",".join(text.partition(":")[0] for text in texts), list(CONTESTANTS))
    entries = [entry_of(text, recompute) for text in texts]
    policies = [entry.recompute for entry in entries]
    chosen("--contestants: policy", ",".join(policies), RECOMPUTE)
    return entries


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        entries = entries_of(options, device)
        if options.rounds < 1:
            raise ValueError(f"--rounds: expected 1 or more, got {options.rounds}")
    except ValueError as error:
        print(f"fluxfast-bench step: {error}", file=sys.stderr)
        return 1
    console = wide_console()
    data: dict[str, Any] = {"kind": "step", "conditions": conditions(device, ["step", *argv]), "ceilings": {}, "records": []}
    for shape in shapes:
        plan = Plan(
            shape, str(device), options.rank, options.optimizer or default_optimizer(device),
            options.rounds, options.seconds, options.torch_profile,
        )  # fmt: skip
        ceilings = _ceilings(plan, options)
        data["ceilings"][shape] = ceilings
        outcomes = Case(plan, entries, apart=not options.one_process, limit=options.limit).measure()
        records = [record_of(outcome, outcomes, plan, ceilings) for outcome in outcomes]
        data["records"] += records
        console.print(table_of(records, f"{shape}, {data['conditions']['device']}"))
        # after each case: a run that is cut keeps what it has
        path = results.write(options.results, data)
    console.print(f"{path}", highlight=False, soft_wrap=True)
    wrong = [r for r in data["records"] if r["ours"] and "reason" in r and r["reason"] != "needs a GPU"]
    return 1 if wrong else 0


def _ceilings(plan: Plan, options: argparse.Namespace) -> dict[str, float]:
    events = worker.run("ceilings", plan) if options.one_process else worker.run_apart("ceilings", plan, limit=options.limit)
    return next((event[1] for event in events if event[0] == "ceilings"), {})
