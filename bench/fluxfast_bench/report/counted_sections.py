"""The tables of what is the same on every device: `counts`, `vram`, `formats`, `quality`,
`predict`.

Each is made from the file of that name under bench/results, which the command of that name writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxfast_bench.quality.tables import markdown
from fluxfast_bench.report.markdown import made_by, markdown_table
from fluxfast_bench.report.predicted import predictions

Rows = list[list[str]]


def counts(data: dict[str, Any]) -> str:
    rows = [
        [
            record["case"],
            f"**{record['contestant']}**" if record["ours"] else record["contestant"],
            f"{record['launches']:,}",
            f"{record['launch_ratio']:.2f}",
            f"{record['memory_bytes'] / 1e9:.0f}",
            f"{record['memory_ratio']:.2f}",
            f"{record['gemm_bytes'] / 1e9:.0f}",
        ]
        for record in data["records"]
    ]
    head = ["", "", "kernel launches", "ratio", "memory-bound GB", "ratio", "GB of products"]
    return f"{made_by(data['run'])}\n\n{markdown_table(head, rows, left=2)}"


def vram(data: dict[str, Any]) -> str:
    """Checkpointed presets, base by base: what a step takes, and its target."""
    shapes = list(dict.fromkeys(record["shape"] for record in data["records"]))
    found = {
        (r["base"], r["shape"], r["streamed"]): r
        for r in data["records"]
        if r["recompute"] == "full"
    }
    rows: Rows = []
    for base in dict.fromkeys(record["base"] for record in data["records"]):
        cells = []
        for streamed in (False, True):
            for shape in shapes:
                record = found.get((base, shape, streamed))
                limit = record and record.get("limit_gib")
                cells.append(
                    ""
                    if record is None
                    else f"{record['gib']:.1f}" + (f" (≤ {limit:g})" if limit else "")
                )
        rows.append([base, *cells])
    head = [
        "base",
        *(
            f"{shape}{', streamed' if streamed else ''}"
            for streamed in (False, True)
            for shape in shapes
        ),
    ]
    return f"{made_by(data['run'])}\n\n{markdown_table(head, rows)}"


def formats(data: dict[str, Any]) -> str:
    conditions = data["conditions"]
    kinds = list(next(row["errors"] for row in data["results"] if row["errors"]))
    rows = [
        [
            f"**{row['name']}**" if row["maker"] == "fluxfast" else row["name"],
            row["maker"],
            f"{row['bits']:.2f}",
            *(f"{100 * row['errors'][kind]:.2f}" for kind in kinds),
        ]
        for row in data["results"]
        if row["bits"] is not None
    ]
    versions = ", ".join(
        f"{name} {version}" for name, version in conditions["versions"].items() if version
    )
    made = (
        f"Weights [{conditions['rows']}, {conditions['cols']}]; {versions}; "
        f"{conditions['commit']}: `fluxfast-bench formats`"
    )
    head = ["format", "", "bits a weight", *(f"{kind}, %" for kind in kinds)]
    return f"{made}\n\n{markdown_table(head, rows, left=2)}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "counts": counts,
    "vram": vram,
    "formats": formats,
    "quality": markdown,
    "predict": predictions,
}


def read(name: str, root: Path) -> dict[str, Any] | None:
    """What `fluxfast-bench NAME` has stored; None where its file is not there.

    Raises ValueError for a file that is no JSON.
    """
    path = root / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except json.JSONDecodeError as error:
        raise unlike(name, root, error) from error


def unlike(name: str, root: Path, error: Exception) -> ValueError:
    """The error about a file that holds something else than its command writes."""
    return ValueError(
        f"{root / name}.json: not what `fluxfast-bench {name}` writes ({error!r}); run it again"
    )


def section(name: str, root: Path) -> str:
    """The table that `name` stands for; empty where its file is not there.

    Raises ValueError for a file that holds something else.
    """
    data = read(name, root)
    try:
        return "" if data is None else SECTIONS[name](data)
    except (KeyError, TypeError) as error:
        raise unlike(name, root, error) from error
