"""`bench/targets.toml`, read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = Path("bench/targets.toml")
TABLES = ("ratio", "floor", "vram", "startup", "counts")


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError where there is no such file, or it can't be read."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run this in a checkout of fluxfast, or name the file with --targets") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    absent = [name for name in TABLES if name not in found]
    if absent:
        raise ValueError(f"{path}: expected the tables {', '.join(TABLES)}; it has no {', '.join(absent)}")
    return found
