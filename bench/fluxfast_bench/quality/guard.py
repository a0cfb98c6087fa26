"""What `bench/targets.toml` promises of quality, held against the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fluxfast_bench.quality.modes import MODES, REFERENCE
from fluxfast_bench.quality.summary import Record, Row, rows_of
from fluxfast_bench.report.verdict import MET, MISSED, UNMEASURED, Verdict

LOSS, SCORE, BITS, RUNS = "evaluation loss", "score of the new concept", "the LoRA's bits", "runs"


def check_names(wanted: Mapping[str, Any]) -> None:
    """Raises ValueError for a mode of the table [quality] that there is not."""
    named = [*wanted["within_noise"], *wanted["loss_above"]]
    if unknown := [name for name in named if name not in MODES]:
        raise ValueError(f"[quality] names modes that there are not: {', '.join(unknown)}")


def verdicts(records: Sequence[Record], wanted: Mapping[str, Any]) -> list[Verdict]:
    """A line for each promise.

    wanted: the table [quality]. Raises ValueError for a mode in it that there is not.
    """
    check_names(wanted)
    rows = rows_of(records)
    found = [*_losses(rows, wanted), *_scores(rows, wanted), *_bits(rows)]
    return found + [
        Verdict(f"{name}: {RUNS}", f"seed {seed}", "to the end", why, MISSED)
        for name, row in rows.items()
        for seed, why in (row.failed or {}).items()
    ]


def of_mode(every: Sequence[Verdict], name: str) -> list[Verdict]:
    """The verdicts that are about a mode."""
    return [each for each in every if each.name.rpartition(": ")[0] == name]


def _losses(rows: Mapping[str, Row], wanted: Mapping[str, Any]) -> Iterator[Verdict]:
    spread = rows[REFERENCE].loss if REFERENCE in rows else None
    allowed = 0.0 if spread is None else wanted["noise"] * spread.deviation
    for name in wanted["within_noise"]:
        text = f"within {wanted['noise']:g} deviations of {REFERENCE}'s seeds"
        text += f", {allowed:.4f}" if spread else ""
        yield _loss(rows, name, text, -allowed, allowed)
    for name, share in wanted["loss_above"].items():
        most = 0.0 if spread is None else share * spread.mean
        text = f"at most {share:.1%} above {REFERENCE}'s" + (f", {most:.4f}" if spread else "")
        yield _loss(rows, name, text, float("-inf"), most)


def _loss(rows: Mapping[str, Row], name: str, text: str, least: float, most: float) -> Verdict:
    row = rows.get(name)
    if row is None or row.loss_difference is None:
        return _unmeasured(f"{name}: {LOSS}", text, row)
    difference = row.loss_difference.mean
    verdict = MET if least <= difference <= most else MISSED
    return Verdict(f"{name}: {LOSS}", _seeds(row), text, f"{difference:+.4f}", verdict)


def _scores(rows: Mapping[str, Row], wanted: Mapping[str, Any]) -> Iterator[Verdict]:
    text = f"at most {wanted['score_below']:g} points below {REFERENCE}'s"
    for name in (*wanted["within_noise"], *wanted["loss_above"]):
        row = rows.get(name)
        if row is None or row.concept_difference is None:
            yield _unmeasured(f"{name}: {SCORE}", text, row)
            continue
        points = 100 * row.concept_difference.mean
        # a share of images, as a float, may be a hair off its limit
        verdict = MET if points >= -wanted["score_below"] - 1e-6 else MISSED
        yield Verdict(f"{name}: {SCORE}", _seeds(row), text, f"{points:+.1f}", verdict)


def _bits(rows: Mapping[str, Row]) -> Iterator[Verdict]:
    for name, mode in MODES.items():
        if not mode.is_equal:
            continue
        text, row = f"those of {mode.reference}", rows.get(name)
        if row is None or row.loss_difference is None:
            yield _unmeasured(f"{name}: {BITS}", text, row)
            continue
        seeds = len(row.loss_difference.values)
        verdict = MET if row.same_bits == seeds else MISSED
        found = f"the same with {row.same_bits} of {seeds} seeds"
        yield Verdict(f"{name}: {BITS}", _seeds(row), text, found, verdict)


def _seeds(row: Row) -> str:
    assert row.loss_difference is not None
    count = len(row.loss_difference.values)
    return f"{count} seed{'s' if count > 1 else ''}"


def _unmeasured(name: str, wanted: str, row: Row | None) -> Verdict:
    return Verdict(name, "", wanted, "" if row is None else row.reason, UNMEASURED)
