"""`fluxfast-bench sweep`, `profile` and `ceilings`."""

import pytest
import torch

from fluxfast_bench.counted.compilers import SHARED_LIMITS
from fluxfast_bench.main import main
from fluxfast_bench.ops import ceilings, sweep
from fluxfast_bench.ops.products import Product, counted
from fluxfast_bench.report import gpu_sections, results
from fluxfast_bench.shapes import SHAPES
from fluxfast_kernels import tiles, waves
from fluxfast_kernels.launch import pretend
from fluxfast_kernels.tiles import TILES, Tile

CPU = torch.device("cpu")


def blocks(name, count):
    return SHAPES[name].with_model(num_layers=count, num_single_layers=count)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_ceilings_are_of_the_products_that_a_step_asks_for(precision):
    shape = blocks("512px-b1", 3)
    found = {}
    for product, count in sweep.products_of(shape, precision).items():
        found[product.size] = found.get(product.size, 0) + count
    # text and image of a double block are one launch
    expected = {}
    for (tokens, *size), count in ceilings.products(shape, codes=precision == "int8").items():
        if tokens != 512:
            together = (1536, *size)
            expected[together] = expected.get(together, 0) + count
    # nothing is wanted of the first block's input
    expected[1536, 3072, 9216] -= 1
    if precision == "bf16":
        # all others run on PyTorch's GEMM, by weights with adapters beside them
        expected = {(1536, 3072, 3072): expected[1536, 3072, 3072]}
    assert found == expected


def test_a_product_is_made_anew_as_it_was():
    shape = SHAPES["tiny"]
    for product in sweep.products_of(shape, "int8"):
        call = product.on(CPU)
        with counted() as again:
            y = call({**sweep.INTERPRETED[0].numbers, "GROUP_M": 3})
        assert list(again) == [product]
        assert y.shape == product.size[:2] and bool(y.isfinite().all())


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_operands_of_all_stages_have_room_in_shared_memory(kind, target):
    itemsize = {"int8": 1, "e4m3": 1, "half": 2, "fp32": 4}[kind.partition("_")[0]]
    for tile in TILES[kind].get(target) or TILES[kind].get("default", ()):
        assert all(size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k, tile.num_warps))
        assert tile.num_stages >= 2 and 0 < tile.efficiency <= 1
        used = (tile.m + tile.n) * tile.k * itemsize * tile.num_stages
        # AMD keeps one stage of them in registers
        used -= used // tile.num_stages if target.startswith("gfx") else 0
        assert used <= SHARED_LIMITS[target]


def test_a_persistent_product_is_tried_in_both_kernels(monkeypatch):
    monkeypatch.setattr(sweep, "interpreted", lambda: False)
    meta = torch.device("meta")
    with pretend("sm_90", lambda *_: None):
        product = next(iter(sweep.products_of(SHAPES["512px-b1"].shallow(), "int8")))
        names = [sweep.name_of(numbers) for numbers in sweep.candidates(product, meta)]
        assert product.kind(meta) == "int8_persistent"
        assert names[0] == sweep.name_of(sweep.table_numbers(product, meta))
    assert len(set(names)) == len(names)
    assert {"128x256x128 w8 s4 persistent", "128x256x128 w8 s4 persistent cut"} < set(names)
    assert "128x256x128 w8 s3" in names


def test_products_look_first_at_what_was_measured(tmp_path, monkeypatch):
    numbers = {**Tile(64, 64, 128, 4, 3).numbers}
    record = {"case": "c", "contestant": "p", "table": False, "kind": "int8", "rows": (512, 1024),
              "cols": (3072,), "k": 3072, "numbers": numbers, "seconds": 1e-4}  # fmt: skip
    slower = {**record, "seconds": 2e-4, "numbers": Tile(64, 128, 128, 4, 3).numbers}
    monkeypatch.setattr(sweep, "arch_key", lambda device: "sm_89")
    monkeypatch.setattr(sweep, "multiprocessors", lambda device: 128)
    run = {"device": "RTX 4090", "date": "2026-01-02"}
    path = tmp_path / "tiles.json"
    for seconds in (3e-4, 1e-4):
        rows = sweep.measured_rows([slower, {**record, "seconds": seconds}], CPU, run)
        sweep.write_tiles(path, rows)
    (stored,) = tiles.read_measured(path)
    assert stored["gpu"] == "RTX 4090" and stored["date"] == "2026-01-02"
    assert stored["numbers"] == numbers and stored["seconds"] == 1e-4
    monkeypatch.setattr(tiles, "MEASURED", path)
    tiles.measured.cache_clear()
    try:
        size = ("int8", (512, 1024), (3072,), 3072, "sm_89")
        assert waves.product_numbers(*size, 128) == numbers
        # another number of multiprocessors, or another size, was not measured
        assert waves.product_numbers(*size, 142)["BLOCK_M"] == 128
        assert waves.product_numbers("int8", (4096,), (3072,), 3072, "sm_89", 128) != numbers
    finally:
        tiles.measured.cache_clear()
    path.write_text('{"rows": [{"kind": "int8"}]}')
    with pytest.raises(ValueError, match="not a file of measured tiles"):
        tiles.read_measured(path)


def test_the_sweep_is_stored_and_its_best_is_told(tmp_path, capsys):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--most", "1", "--results", str(tmp_path)]
    assert main(["sweep", *arguments]) == 0
    (stored,) = results.read_all(tmp_path)
    assert {r["mode"] for r in stored.records} >= {"16x32x32 w4 s2", "32x32x32 w4 s2"}
    assert all(r["seconds"] > 0 and r["tflops"] > 0 for r in stored.records)
    assert {r["contestant"].split()[0] for r in stored.records} == {"int8", "bfloat16"}
    assert "a step, ms less" in capsys.readouterr().out


def test_a_tile_without_room_is_no_best(monkeypatch):
    def no_room(self, device):
        def call(numbers):
            raise RuntimeError("out of resource: shared memory")

        return call

    (product, *_) = sweep.products_of(SHAPES["tiny"], "int8")
    monkeypatch.setattr(Product, "on", no_room)
    records = [{"case": "tiny", "count": 1, **r} for r in sweep.time_product(product, CPU, 0)]
    assert gpu_sections.best_of(records) == []
    assert gpu_sections.untimed(records) == [
        f"tiny {product}: RuntimeError: out of resource: shared memory"
    ]


def test_kernels_are_summed_up(tmp_path, capsys):
    arguments = [
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--contestants",
        "fluxfast:none,fluxfast+graphs",
    ]
    assert main(["profile", *arguments, "--results", str(tmp_path)]) == 0
    (stored,) = results.read_all(tmp_path)
    step, *kernels = stored.records
    assert step["mode"] == "step" and step["seconds"] > 0 and len(kernels) > 10
    assert sum(r["seconds"] for r in kernels) == pytest.approx(step["busy_seconds"], rel=1e-3)
    assert {r["contestant"] for r in stored.records} == {"fluxfast:none"}
    told = capsys.readouterr()
    assert "of them in kernels" in told.out and "fluxfast+graphs:full: needs a GPU" in told.err


def test_ceilings_are_stored_by_figure(tmp_path):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--seconds", "0", "--results"]
    assert main(["ceilings", *arguments, str(tmp_path)]) == 0
    (stored,) = results.read_all(tmp_path)
    assert set(stored.data["ceilings"]["tiny"]) == {
        "copy",
        "float",
        "attention_forward",
        "attention_backward",
    }
    assert {r["contestant"].split()[0] for r in stored.records} == set(
        stored.data["ceilings"]["tiny"]
    )
