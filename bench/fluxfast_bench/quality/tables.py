"""The runs of `fluxfast-bench quality` as a table, on the screen and in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fluxfast_bench.quality import guard
from fluxfast_bench.quality.modes import REFERENCE
from fluxfast_bench.quality.summary import NO_LORA, Record, Row, rows_of
from fluxfast_bench.report.markdown import made_by, markdown_table
from fluxfast_bench.report.verdict import COLOURS, MET, MISSED, Verdict

HEAD = ("", "loss", "±", f"vs {REFERENCE}", "±", "new, %", "old, %", "promise")
# a screen of 80 columns has no room for it
_NOT_ON_SCREEN = 4
_NOTE = (
    "loss: of held-out images, always with the same noise, in the precision that is trained in; "
    "new and old: how many of the drawings show what the prompt asks for, the new concept and what "
    "the base knew, by the base in fp32; ±: standard deviation over the seeds"
)


def screen(records: Sequence[Record], verdicts: Sequence[Verdict]) -> Table:
    """The table for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_NOTE, caption_justify="left")
    for index, title in enumerate(HEAD):
        if index != _NOT_ON_SCREEN:
            table.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
    for group in _groups(records, verdicts):
        for cells in group:
            shown = [cell for index, cell in enumerate(cells) if index != _NOT_ON_SCREEN]
            colour = COLOURS.get(cells[-1])
            table.add_row(*shown[:-1], f"[{colour}]{cells[-1]}" if colour else "")
        table.add_section()
    return table


def not_run(records: Sequence[Record]) -> list[str]:
    """A line for each mode that can't be on this machine."""
    return [
        f"not run, {name}: {row.reason}" for name, row in rows_of(records).items() if row.reason
    ]


def markdown(data: Mapping[str, Any], verdicts: Sequence[Verdict] | None = None) -> str:
    """The table of a result file, under the conditions of its runs.

    verdicts: None: the column of promises is left out.
    """
    settings, run, records = data["settings"], data["conditions"], data["records"]
    seeds = len({record["seed"] for record in records if "loss" in record})
    task = f"{settings['steps']} steps, {seeds} seeds, {settings['images']} drawings of each kind"
    made = f"{task}; base {settings['base']}; {run['device']}; {made_by(run)}"
    # runs of an interrupted command may be of the commit before
    if len(commits := sorted({record["commit"] for record in records if "loss" in record})) > 1:
        made += f"; runs of {', '.join(commits)}"
    rows = [cells for group in _groups(records, verdicts or ()) for cells in group]
    columns = slice(None if verdicts is not None else -1)
    table = markdown_table(HEAD[columns], [cells[columns] for cells in rows])
    parts = [made, table, f"{_NOTE[0].upper()}{_NOTE[1:]}."]
    if lines := not_run(records):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def _groups(records: Sequence[Record], verdicts: Sequence[Verdict]) -> Iterator[list[list[str]]]:
    """The rows' cells, under the titles of HEAD, group by group; first that of the base alone."""
    if alone := [_no_lora(record, records) for record in records if record["mode"] == NO_LORA]:
        yield alone
    ran = [row for row in rows_of(records).values() if row.loss is not None or row.failed]
    for _, rows in itertools.groupby(ran, key=lambda row: row.mode.group):
        yield [_cells(row, verdicts) for row in rows]


def _no_lora(record: Record, records: Sequence[Record]) -> list[str]:
    before = next(
        (r["loss_before"] for r in records if r["mode"] == REFERENCE and "loss" in r), None
    )
    loss = "" if before is None else f"{before:.4f}"
    return [NO_LORA, loss, "", "", "", _percent(record["concept"]), _percent(record["old"]), ""]


def _cells(row: Row, verdicts: Sequence[Verdict]) -> list[str]:
    name = row.mode.name
    if row.mode.reference != REFERENCE:
        name += f" (vs {row.mode.reference})"
    own = {each.verdict for each in guard.of_mode(verdicts, row.mode.name)}
    promise = MISSED if MISSED in own else MET if MET in own else ""
    if row.loss is None or row.concept is None or row.old is None:
        return [name, *[""] * (len(HEAD) - 2), promise]
    minus, deviation = "", ""
    difference = row.loss_difference
    if difference is not None and name != REFERENCE:
        minus, deviation = f"{difference.mean:+.4f}", f"{difference.deviation:.4f}"
        if row.same_bits == len(difference.values):
            minus, deviation = "same bits", ""
    return [
        name,
        f"{row.loss.mean:.4f}",
        f"{row.loss.deviation:.4f}",
        minus,
        deviation,
        f"{_percent(row.concept.mean)} ± {_percent(row.concept.deviation)}",
        f"{_percent(row.old.mean)} ± {_percent(row.old.deviation)}",
        promise,
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
