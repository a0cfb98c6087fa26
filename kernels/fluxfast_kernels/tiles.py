"""The tiles that a wide product may be cut into, by its kind and the GPU's architecture, as data.

A kind is the type of the product ("int8", "e4m3", "half", "fp32") and how it is computed: plain
where w's contraction is contiguous, "_t" where it is not, and "_persistent" for the kernel that
reads both through tensor descriptors. An architecture without a row of that last kind has no such
kernel. `waves.best` chooses among an architecture's tiles.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ASSUMED = "assumed"


class Tile(NamedTuple):
    """What a program computes at a time, and how.

    m, n: rows and columns of y; k: of the contraction in one block. efficiency: the part of the
    GPU's sustained rate that the main loop reaches with it, and `source` says who says so.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    efficiency: float = 1.0
    source: str = ASSUMED

    @property
    def numbers(self) -> dict[str, int]:
        """The launch numbers of the kernels."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": 8,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# launch numbers that only the persistent kernel has. PERSISTENT: whether it runs; PROGRAMS: as many
# as there are multiprocessors; CUT: whether the tiles that would not fill a wave are cut along K
PERSISTENT_ONLY = ("PERSISTENT", "PROGRAMS", "CUT")

TileTable = Mapping[str, tuple[Tile, ...]]

_AMPERE = ("sm_80", "sm_86", "sm_89", "sm_120")


def _tiles(default: Tile, nvidia: tuple[Tile, ...], **archs: tuple[Tile, ...]) -> TileTable:
    return {"default": (default,), **dict.fromkeys(_AMPERE, nvidia), **archs}


# each compiled ahead of time without a spill for its target; none measured on a device
_BYTES = (
    Tile(128, 128, 128, 8, 3),
    Tile(64, 128, 128, 4, 3, 0.8),
    Tile(64, 64, 128, 4, 3, 0.55),
)
TILES: dict[str, TileTable] = {
    "int8": _tiles(
        Tile(128, 64, 64, 8, 2),
        _BYTES,
        sm_90=(
            Tile(128, 256, 128, 8, 3),
            Tile(128, 128, 128, 8, 4, 0.88),
            Tile(64, 128, 128, 4, 4, 0.65),
        ),
        gfx942=(Tile(128, 128, 128, 8, 2),),
    ),
    "e4m3": _tiles(
        Tile(128, 64, 64, 8, 2),
        _BYTES,
        sm_90=(Tile(128, 128, 128, 8, 4), Tile(64, 128, 128, 4, 4, 0.75)),
        gfx942=(Tile(128, 128, 64, 8, 2),),
    ),
    "half": _tiles(
        Tile(128, 64, 32, 8, 2),
        (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3, 0.8), Tile(64, 64, 64, 4, 3, 0.55)),
        sm_90=(
            Tile(128, 256, 64, 8, 4),
            Tile(128, 128, 64, 8, 4, 0.88),
            Tile(64, 128, 64, 4, 4, 0.65),
        ),
        gfx942=(Tile(128, 128, 64, 8, 2),),
    ),
    "fp32": _tiles(
        Tile(64, 64, 16, 8, 2), (Tile(64, 64, 32, 4, 2),), sm_90=(Tile(64, 64, 32, 8, 3),)
    ),
}
# where w's contraction is not the contiguous dimension. sm_90's 8-bit tensor cores take K-major
# operands only, so its tile is transposed byte by byte, which a wider tile doesn't make cheaper
TILES |= {f"{kind}_t": rows for kind, rows in TILES.items()}
TILES["int8_t"] = {**TILES["int8"], "sm_90": TILES["int8"]["sm_90"][1:]}
TILES["int8_persistent"] = {
    "sm_90": (
        Tile(128, 256, 128, 8, 4),
        Tile(128, 128, 128, 8, 4, 0.88),
        Tile(64, 128, 128, 4, 4, 0.65),
    )
}
TILES["e4m3_persistent"] = {
    "sm_90": (Tile(128, 128, 128, 8, 4), Tile(64, 128, 128, 4, 4, 0.75)),
}


class ProductKey(NamedTuple):
    """What a measured product is known by: its kind, its size, and the GPU.

    rows: of each part; cols: of each linear; multiprocessors: of the GPU, on which waves depend.
    """

    kind: str
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    k: int
    arch: str
    multiprocessors: int


# what `fluxfast-bench sweep --write-tiles` found: for each product the fastest launch numbers, with
# the seconds, the GPU's name and the date
MEASURED = Path(__file__).with_name("measured_tiles.json")


def read_measured(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of measured tiles. Raises ValueError for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            key_of(row), row["numbers"]["BLOCK_M"], row["gpu"], row["date"], row["seconds"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of measured tiles ({error}); fluxfast-bench sweep writes one"
        ) from None
    return rows


def key_of(row: Mapping[str, Any]) -> ProductKey:
    """The key of a row of a file of measured tiles."""
    return ProductKey(
        row["kind"], tuple(row["rows"]), tuple(row["cols"]), row["k"], row["arch"],
        row["multiprocessors"],
    )  # fmt: skip


def merged(
    rows: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Both, sorted; a new row takes the place of an old one of the same product and GPU."""
    found = {key_of(row): row for row in (*rows, *new)}
    return [found[key] for key in sorted(found)]


@functools.cache
def measured() -> Mapping[ProductKey, Mapping[str, int]]:
    """The fastest launch numbers of every product that was measured."""
    return {key_of(row): row["numbers"] for row in read_measured(MEASURED)}
