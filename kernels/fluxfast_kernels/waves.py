"""How long a wide product takes: its tiles, in waves over a GPU's multiprocessors.

A launch of 48 tiles leaves 84 of 132 multiprocessors idle, and one of 133 tiles takes as long as
one of 264. So which tile is best depends on the product's size:

    seconds = waves · (main loop of a tile + what it takes to begin and to end one)

Plain numbers go in and seconds come out. To predict a product on some GPU:

    rows, cols, k = (512, 4096), (3072, 3072, 3072), 3072  # two parts, three linears
    tile = best("int8_persistent", rows, cols, k, "sm_90").tile  # that the kernel would take
    product_seconds(rows, cols, k, tile, rate=1150e12, multiprocessors=132, streams=True)

`rows` are the rows of the parts of x that have weights of their own (text and image), `cols` the
columns of the linears side by side: a tile crosses the end of neither. Nothing here is measured.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fluxfast_kernels.tiles import ASSUMED, PERSISTENT_ONLY, TILES, ProductKey, Tile, measured


class Sustained(NamedTuple):
    """What an architecture's best known chip sustains over a long product.

    multiprocessors: that it has. rates: operations a second of the whole chip by the type of the
    product, where tiles fill it. partials: bytes a second at which all its multiprocessors together
    write or read partial sums, which stay in L2.
    """

    multiprocessors: int
    rates: Mapping[str, float]
    partials: float
    source: str = ASSUMED


SUSTAINED: dict[str, Sustained] = {
    "default": Sustained(64, {"int8": 60e12, "e4m3": 60e12, "half": 50e12, "fp32": 10e12}, 1e12),
    "sm_80": Sustained(108, {"int8": 400e12, "half": 220e12, "fp32": 15e12}, 3e12),
    "sm_86": Sustained(82, {"int8": 200e12, "half": 62e12, "fp32": 20e12}, 2e12),
    "sm_89": Sustained(128, {"int8": 450e12, "e4m3": 280e12, "half": 150e12, "fp32": 40e12}, 4e12),
    "sm_90": Sustained(132, {"int8": 1150e12, "e4m3": 900e12, "half": 680e12, "fp32": 40e12}, 5e12),
    "sm_120": Sustained(170, {"int8": 570e12, "e4m3": 350e12, "half": 190e12, "fp32": 60e12}, 5e12),
    "gfx942": Sustained(304, {"int8": 900e12, "e4m3": 900e12, "half": 500e12, "fp32": 60e12}, 5e12),
}

# to fill the pipeline of a tile's main loop, and to finish and store 32768 numbers of y
PROLOGUE, EPILOGUE = 1.5e-6, 5e-6


class Cut(NamedTuple):
    """How stream-K cuts the tiles that would not fill a wave.

    tiles: how many, the last ones; 0: none. share: the blocks of K that a program takes of them,
    the next program going on where it ended. programs: that have a share.
    """

    tiles: int = 0
    share: int = 0
    programs: int = 0


class Choice(NamedTuple):
    """The tile for a product, how its last tiles are cut, and the predicted seconds."""

    tile: Tile
    cut: Cut
    seconds: float


def tiles_of(rows: Sequence[int], cols: Sequence[int], tile: Tile) -> int:
    """The tiles of all parts' rows by all linears' columns."""
    return sum(-(-m // tile.m) for m in rows) * sum(-(-n // tile.n) for n in cols)


def cut_of(tiles: int, k_blocks: int, programs: int) -> Cut:
    """Stream-K for what whole waves of `programs` leave: equal shares, of four blocks at least."""
    left = tiles % programs
    if not left or not k_blocks:
        return Cut()
    share = max(-(-left * k_blocks // programs), min(4, k_blocks))
    return Cut(left, share, -(-left * k_blocks // share))


def product_seconds(
    rows: Sequence[int],
    cols: Sequence[int],
    k: int,
    tile: Tile,
    *,
    rate: float,
    multiprocessors: int,
    partials: float = SUSTAINED["sm_90"].partials,
    streams: bool = False,
) -> float:
    """Seconds of x [Σ rows, k] times w [Σ cols, k] with this tile.

    rate: operations a second that the GPU sustains in products of the type; partials: bytes a
    second of partial sums (`Sustained`). streams: by the persistent kernel, which may cut its last
    tiles (`Cut`) and does where that is faster; else in whole waves.
    """
    if not streams:
        return _whole(rows, cols, k, tile, rate / multiprocessors, multiprocessors)
    return min(
        seconds
        for _, seconds in _schedules(
            rows, cols, k, tile, rate / multiprocessors, multiprocessors, partials
        )
    )


def _whole(
    rows: Sequence[int], cols: Sequence[int], k: int, tile: Tile, rate: float, multiprocessors: int
) -> float:
    waves = -(-tiles_of(rows, cols, tile) // multiprocessors)
    return waves * (_main(-(-k // tile.k), tile, rate) + _ends(tile))


def _main(k_blocks: int, tile: Tile, rate: float) -> float:
    return 2 * tile.m * tile.n * tile.k * k_blocks / (rate * tile.efficiency)


def _ends(tile: Tile) -> float:
    return PROLOGUE + EPILOGUE * tile.m * tile.n / 32768


def _schedules(
    rows: Sequence[int],
    cols: Sequence[int],
    k: int,
    tile: Tile,
    rate: float,
    multiprocessors: int,
    partials: float,
) -> list[tuple[Cut, float]]:
    """Seconds in whole waves, and with the last tiles cut where they leave multiprocessors idle."""
    whole = (Cut(), _whole(rows, cols, k, tile, rate, multiprocessors))
    tiles, k_blocks = tiles_of(rows, cols, tile), -(-k // tile.k)
    cut = cut_of(tiles, k_blocks, multiprocessors)
    if not cut.tiles or cut.share >= k_blocks:
        return [whole]
    # a share may end one tile and begin another: two partial sums to write. Who comes last to a
    # tile reads those of all
    moved = (2 + -(-k_blocks // cut.share)) * 4 * tile.m * tile.n
    full = _main(k_blocks, tile, rate) + _ends(tile)
    seconds = (tiles // multiprocessors) * full
    seconds += _main(cut.share, tile, rate) + 2 * _ends(tile) + moved * multiprocessors / partials
    return [whole, (cut, seconds)]


@functools.lru_cache(maxsize=4096)
def best(
    kind: str,
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    k: int,
    arch: str,
    multiprocessors: int = 0,
) -> Choice:
    """The fastest of the architecture's tiles for a product of a kind of TILES.

    multiprocessors: of the GPU at hand; 0: those of the architecture's row in SUSTAINED. Products
    of a "_persistent" kind may have their last tiles cut.
    """
    known = SUSTAINED.get(arch) or SUSTAINED["default"]
    number = multiprocessors or known.multiprocessors
    rate = known.rates[kind.partition("_")[0]] / known.multiprocessors
    table = TILES[kind]
    found = []
    for tile in table.get(arch) or table["default"]:
        schedules = _schedules(rows, cols, k, tile, rate, number, known.partials)
        for cut, seconds in schedules if kind.endswith("_persistent") else schedules[:1]:
            found.append(Choice(tile, cut, seconds))
    # the first of the table's where they are equal
    return min(found, key=lambda choice: choice.seconds)


def product_numbers(
    kind: str,
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    k: int,
    arch: str,
    multiprocessors: int = 0,
) -> Mapping[str, int]:
    """The launch numbers of a product, as `best` takes its arguments.

    They are those that were fastest where this product was measured on such a GPU, else those of
    the tile that the model finds best.
    """
    number = multiprocessors or (SUSTAINED.get(arch) or SUSTAINED["default"]).multiprocessors
    rows = tuple(m for m in rows if m)
    key = ProductKey(kind, rows, cols, k, arch, number)
    if (fastest := measured().get(key)) is not None:
        return fastest
    choice = best(kind, rows, cols, k, arch, number)
    if not kind.endswith("_persistent"):
        return choice.tile.numbers
    own = {"PERSISTENT": 1, "PROGRAMS": number, "CUT": int(choice.cut.tiles > 0)}
    return {**choice.tile.numbers, **own}


class Schedule(NamedTuple):
    """How a product is launched.

    numbers: the kernel's launch numbers. persistent: whether that is the persistent kernel.
    programs: of the launch. n_tiles: of the columns. whole: tiles of which nothing is cut, the
    others being the `cut.tiles`.
    """

    numbers: Mapping[str, int]
    persistent: bool
    programs: int
    n_tiles: int
    whole: int
    cut: Cut


def scheduled(
    kind: str, rows: Sequence[int], cols: Sequence[int], k: int, numbers: Mapping[str, int]
) -> Schedule:
    """The schedule of a product of a kind by launch numbers such as `product_numbers` has."""
    n_tiles = sum(-(-n // numbers["BLOCK_N"]) for n in cols)
    tiles = n_tiles * sum(-(-m // numbers["BLOCK_M"]) for m in rows)
    own = {name: number for name, number in numbers.items() if name not in PERSISTENT_ONLY}
    if not (kind.endswith("_persistent") and numbers["PERSISTENT"]):
        return Schedule(own, False, tiles, n_tiles, tiles, Cut())
    most = numbers["PROGRAMS"]
    cut = cut_of(tiles, -(-k // numbers["BLOCK_K"]), most) if numbers["CUT"] else Cut()
    whole = tiles - cut.tiles
    return Schedule(own, True, max(min(whole, most), cut.programs), n_tiles, whole, cut)


@functools.lru_cache(maxsize=4096)
def best_schedule(
    kind: str,
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    k: int,
    arch: str,
    multiprocessors: int = 0,
) -> Schedule:
    """The schedule by `product_numbers`; a launch asks for it each time."""
    numbers = product_numbers(kind, rows, cols, k, arch, multiprocessors)
    return scheduled(kind, rows, cols, k, numbers)
