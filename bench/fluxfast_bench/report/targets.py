"""`bench/targets.toml`, read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = Path("bench/targets.toml")
# a ratio that `counts` stores, and what it is called in [counts]
COUNT_RATIOS = {"memory_ratio": "bytes", "launch_ratio": "launches"}
# GiB that SimpleTuner's quickstart for FLUX.1 names, by base
QUICKSTART = {"bf16": 30, "int8": 18, "int4": 13, "nf4": 9, "int2": 9}
TABLES = ("devices", "ratio", "floor", "vram", "startup", "counts", "adapters", "quality")


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", type=Path, default=TARGETS, help="default: %(default)s")


def count_limits(counts: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(what of a record of `counts` has a limit, the limit); counts: the table [counts].

    All steps of ours have the same limits, and some have narrower ones of their own.
    """
    if record["ours"]:
        yield from ((key, counts[name]) for key, name in COUNT_RATIOS.items())
    for step in counts.get("steps", []):
        if all(step[key] == record[key] for key in ("case", "contestant")):
            yield from ((key, step[key]) for key in ("launches", "memory_ratio"))


def vram_limit(
    wanted: dict[str, Any], base: str, shape: str, *, streamed: bool, recompute: str
) -> float | None:
    """The most GiB for a step of that base and shape; None where nothing was promised. `wanted`:
    the whole file.
    """
    if recompute != "full" or not shape.endswith("px-b1"):
        return None
    place = f"{'streamed' if streamed else 'resident'}-{shape.removesuffix('px-b1')}"
    return wanted["vram"].get(base, {}).get(place)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError where there is no such file, or it can't be read."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found; run this in a checkout of fluxfast, or name the file with "
            "--targets"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    absent = [name for name in TABLES if name not in found]
    if absent:
        raise ValueError(
            f"{path}: expected the tables {', '.join(TABLES)}; it has no {', '.join(absent)}"
        )
    return found
