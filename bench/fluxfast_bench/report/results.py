"""Stored results: one JSON file a run, under `<root>/<device>/<date>-<kind>.json`.

    {"kind": "step", "conditions": {…}, "ceilings": {…}, "records": [{"case": …, …}, …]}

What the records hold is the command's own; `figures` says which of it is compared from run to run.
What is counted, and so the same on every device, is a single file (`write_counted`).

While a command runs, what it has found so far is in `….jsonl` beside, a line each (`Journal`). A
run that was cut short leaves that, and it is read like a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fluxfast.files import write_atomic
from fluxfast_bench.report.conditions import conditions, slug

# in a checkout of fluxfast its own results, elsewhere a folder that says whose it is
ROOT = Path("bench/results" if Path("bench/targets.toml").exists() else "fluxfast-bench-results")
KINDS = (
    "ops",
    "step",
    "startup",
    "host",
    "prewarm",
    "ceilings",
    "smoke",
    "sweep",
    "profile",
    "tests",
    "trainers",
    "loops",
)
# what tells a run's records apart
IDENTITY = ("case", "contestant", "mode")
# of which figures are compared from run to run
COMPARED = ("ops", "step", "startup", "host")


@dataclass(frozen=True)
class Result:
    """A run as it is stored. device: the folder's name. date: of the run, as in its conditions."""

    device: str
    path: Path
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.data["kind"]

    @property
    def date(self) -> str:
        return self.data["conditions"]["date"]

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.data["records"]

    @property
    def cut(self) -> bool:
        """Whether the run has not ended."""
        return self.path.suffix == ".jsonl"


def path_of(root: Path, data: dict[str, Any]) -> Path:
    """Where a run is stored."""
    run = data["conditions"]
    return root / slug(run["device"]) / f"{run['date'].replace(':', '')}-{data['kind']}.json"


def write(root: Path, data: dict[str, Any]) -> Path:
    """Stores a run where `read_all` finds it; returns the path."""
    path = path_of(root, data)
    head = json.dumps({key: value for key, value in data.items() if key != "records"}, indent=1)
    write_atomic(path, f'{head[:-2]},\n "records": [\n{_lines(data["records"])}\n ]\n}}\n'.encode())
    return path


class Journal:
    """A run's results, each written down when it is known, so that a run that is cut keeps them.

    The file's first line is the run's kind and conditions. Then come `{"note": {…}}`, which is
    merged into the run's data, and `{"record": {…}}`. A record of the same case, contestant and
    mode as an earlier one takes its place. `finish` makes the result (`write`) from the file, and
    removes it.
    """

    def __init__(self, root: Path, kind: str, run: dict[str, Any]) -> None:
        head = {"kind": kind, "conditions": run}
        self._root, self._path = root, path_of(root, head).with_suffix(".jsonl")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._add(head, "w")

    def note(self, **more: Any) -> None:
        """What belongs to the run and to no record; dictionaries are merged."""
        self._add({"note": more})

    def record(self, record: dict[str, Any]) -> None:
        self._add({"record": record})

    def records(self) -> list[dict[str, Any]]:
        """What has been written down so far."""
        return _read_journal(self._path)["records"]

    def finish(self) -> Path:
        """The path of the whole result."""
        path = write(self._root, _read_journal(self._path))
        self._path.unlink()
        return path

    def _add(self, line: dict[str, Any], mode: str = "a") -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read_journal(path: Path) -> dict[str, Any]:
    """Raises ValueError where it isn't one; a last line that was being written is left out."""
    head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    data, records = json.loads(head), {}
    for line in lines:
        if not line.endswith("\n"):
            break
        found = json.loads(line)
        for key, value in found.get("note", {}).items():
            data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
        if (record := found.get("record")) is not None:
            records[tuple(record.get(key) for key in IDENTITY)] = record
    return data | {"records": list(records.values())}


def write_counted(path: Path, command: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Stores what a command has counted."""
    run = conditions(torch.device("cpu"), command)
    head = json.dumps({key: run[key] for key in ("date", "commit", "command", "versions")})
    write_atomic(path, f'{{\n"run": {head},\n"records": [\n{_lines(records)}\n]\n}}\n'.encode())


def _lines(records: Sequence[dict[str, Any]]) -> str:
    return ",\n".join(f"  {json.dumps(record)}" for record in records)


def read(path: Path) -> Result:
    """Raises ValueError for a file that holds something else."""
    try:
        data = (
            _read_journal(path)
            if path.suffix == ".jsonl"
            else json.loads(path.read_text(encoding="utf-8"))
        )
        assert (
            data["kind"] in KINDS
            and isinstance(data["records"], list)
            and data["conditions"]["date"]
        )
    except (ValueError, AttributeError, KeyError, TypeError, AssertionError):
        raise ValueError(
            f"{path}: not a result of fluxfast-bench {', '.join(KINDS)}; remove it from there"
        ) from None
    return Result(path.parent.name, path, data)


def read_all(root: Path) -> list[Result]:
    """Every stored run, whole or cut short, by device and then by date."""
    cut = [path for path in root.glob("*/*.jsonl") if not path.with_suffix(".json").exists()]
    found = [read(path) for path in sorted([*root.glob("*/*.json"), *cut])]
    return sorted(found, key=lambda result: (result.device, result.date))


def read_counted(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of `vram`, `counts`, `aot` and `quality`, as far as they are there.

    They are the same on every device, or belong to a small model that any device trains.
    """
    found = {}
    for name, key in (
        ("vram", "records"),
        ("counts", "records"),
        ("aot", "variants"),
        ("quality", "records"),
    ):
        path = root / f"{name}.json"
        if path.exists():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))[key]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{path}: not what fluxfast-bench {name} writes; remove it, or run that again"
                ) from None
    return found


def figures(result: Result) -> Iterator[tuple[str, float, bool]]:
    """Name, value and whether more is better, of each figure that a later run may not worsen.

    Only runs on the same device are compared. On a CPU, which other programs use too, the figures
    are ratios of steps that were timed in turn, and memory; elsewhere also times. The ratios are
    those to peers: a ratio to another of ours would become worse where that one became better.
    """
    if result.kind not in COMPARED:
        return
    ours = {record.get("contestant") for record in result.records if record["ours"]}
    shared = "cuda" not in result.data["conditions"]
    for record in result.records:
        if "reason" in record or not record["ours"]:
            continue
        name = " ".join(
            [
                result.kind,
                *(str(record[key]) for key in ("case", "contestant", "mode") if key in record),
            ]
        )
        for key in ("seconds", "peak_gib", "peak_rss_gib"):
            if record.get(key) is not None and not (shared and key == "seconds"):
                yield f"{name} {key}", record[key], False
        if result.kind == "step":
            for peer, ratio in (
                (peer, ratio) for peer, ratio in record["ratios"].items() if peer not in ours
            ):
                yield f"{name} vs {peer}", ratio, True


def newest_cases(
    stored: Sequence[Result], kind: str
) -> list[tuple[Result, str, list[dict[str, Any]]]]:
    """The newest run of each case on each device, the case, and its records in that run."""
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
