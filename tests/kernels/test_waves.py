"""The wave model: counts of tiles, what a wave costs, shares of stream-K, and the tile chosen."""

import pytest

from fluxfast_kernels.tiles import TILES, Tile
from fluxfast_kernels.waves import (
    EPILOGUE,
    PROLOGUE,
    SUSTAINED,
    best,
    cut_of,
    product_seconds,
    tiles_of,
)

TILE = Tile(128, 256, 128, 8, 3)
H100 = {"rate": 1150e12, "multiprocessors": 132}
# every kind of product that an architecture has: sm_80 has no e4m3
KINDS = [
    (kind, arch)
    for kind, table in TILES.items()
    for arch, known in SUSTAINED.items()
    if (arch in table or "default" in table) and kind.partition("_")[0] in known.rates
]


def test_tiles_end_where_a_part_or_a_linear_ends():
    assert tiles_of((512,), (3072,), TILE) == 4 * 12
    assert tiles_of((1, 130), (3072, 100), TILE) == (1 + 2) * (12 + 1)
    assert tiles_of((0, 130), (256,), TILE) == 2


def test_whole_waves():
    one = 2 * 128 * 256 * 3072 / (1150e12 / 132) + PROLOGUE + EPILOGUE
    # 132 tiles are a wave, one more is another
    for m, waves in ((128 * 11, 1), (128 * 11 + 1, 2), (128 * 22, 2)):
        assert product_seconds((m,), (3072,), 3072, TILE, **H100) == pytest.approx(waves * one)
    # a tile that reaches half of the rate, and a GPU of half the rate
    half = product_seconds((64,), (64,), 3072, TILE._replace(efficiency=0.5), **H100)
    assert half == product_seconds((64,), (64,), 3072, TILE, rate=575e12, multiprocessors=132)


@pytest.mark.parametrize("tiles", [1, 5, 131, 132, 133, 300])
@pytest.mark.parametrize("k_blocks", [1, 3, 24, 120])
def test_shares_cover_what_whole_waves_leave(tiles, k_blocks):
    cut = cut_of(tiles, k_blocks, 132)
    assert cut.tiles == tiles % 132
    if cut.tiles:
        blocks = cut.tiles * k_blocks
        assert (cut.programs - 1) * cut.share < blocks <= cut.programs * cut.share
        # a share lies in two tiles at most
        assert cut.programs <= 132 and min(4, k_blocks) <= cut.share <= k_blocks


def test_stream_k_is_taken_where_it_is_faster():
    # 48 tiles on 132 multiprocessors: not for a short sum, which costs less than to add parts up
    long, short = (
        best("int8_persistent", (512,), (3072,), k, "sm_90").cut.tiles > 0 for k in (12288, 1024)
    )
    assert long and not short
    # never where the kernel can't
    assert best("int8", (512,), (3072,), 12288, "sm_90").cut.tiles == 0
    for k in (1024, 12288):
        streams, whole = (
            product_seconds((512,), (3072,), k, TILE, **H100, streams=s) for s in (True, False)
        )
        assert streams <= whole


@pytest.mark.parametrize(("kind", "arch"), KINDS)
def test_a_choice_is_one_of_the_architectures_tiles(kind, arch):
    table = TILES[kind]
    for rows in ((1,), (63,), (512, 1024), (4608,)):
        choice = best(kind, rows, (3072, 3072), 3072, arch)
        assert choice.tile in (table.get(arch) or table["default"]) and choice.seconds > 0


def test_more_work_takes_longer_and_fewer_multiprocessors_too():
    times = [best("int8", (m,), (3072,), 3072, "sm_90").seconds for m in (1, 512, 1024, 4096, 8192)]
    assert times == sorted(times)
    few, many = (best("int8", (4096,), (3072,), 3072, "sm_90", n).seconds for n in (66, 132))
    assert few > many
    # two parts in one launch fill waves that each alone leaves open, and never need one more
    joint = product_seconds((256, 1024), (3072,), 3072, TILE, **H100)
    apart = [product_seconds((m,), (3072,), 3072, TILE, **H100) for m in (256, 1024)]
    assert joint < sum(apart)
