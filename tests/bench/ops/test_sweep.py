"""`fluxfast-bench sweep`, `profile` and `ceilings`."""

import pytest
import torch

from fluxfast_bench.main import main
from fluxfast_bench.ops import ceilings, sweep
from fluxfast_bench.ops.products import Product, counted
from fluxfast_bench.report import gpu_sections, results
from fluxfast_bench.shapes import SHAPES
from fluxfast_kernels.matmul import MATMUL

CPU = torch.device("cpu")


def blocks(name, count):
    return SHAPES[name].with_model(num_layers=count, num_single_layers=count)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_ceilings_are_of_the_products_that_a_step_asks_for(precision):
    shape = blocks("512px-b1", 3)
    found = {}
    for product, count in sweep.products_of(shape, precision).items():
        found[product.size] = found.get(product.size, 0) + count
    expected = ceilings.products(shape, codes=precision == "int8")
    # nothing is wanted of the first block's input: a product less for the image, and for the text
    first = {(tokens, 3072, 9216): 1 for tokens in (512, 1024)}
    assert found == {size: count - first.get(size, 0) for size, count in expected.items()}


def test_a_product_is_made_anew_as_it_was():
    shape = SHAPES["tiny"]
    for product in sweep.products_of(shape, "int8"):
        call = product.on(CPU)
        with counted() as again:
            y = call(sweep.numbers_of(sweep.INTERPRETED[0]) | {"GROUP_M": 3})
        assert list(again) == [product]
        assert y.shape == product.size[:2] and bool(y.isfinite().all())


def test_every_kind_has_tiles_that_the_kernel_takes():
    for kind, tiles in sweep.TILES.items():
        assert len(set(tiles)) == len(tiles) >= 6
        row = MATMUL[kind]["sm_90"]
        assert sweep.name_of(row) in {sweep.name_of(sweep.numbers_of(tile)) for tile in tiles}
        for m, n, k, warps, stages in tiles:
            assert all(size & (size - 1) == 0 for size in (m, n, k, warps)) and stages >= 2
            # operands of every stage, in a Hopper program's shared memory
            assert (m + n) * k * (1 if kind == "int8" else 2) * stages <= 227 << 10


def test_the_sweep_is_stored_and_its_best_is_told(tmp_path, capsys):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--most", "1", "--results", str(tmp_path)]
    assert main(["sweep", *arguments]) == 0
    (stored,) = results.read_all(tmp_path)
    assert {r["mode"] for r in stored.records} >= {"16x32x32 w4 s2", "32x32x32 w4 s2"}
    assert all(r["seconds"] > 0 and r["tflops"] > 0 for r in stored.records)
    assert {r["contestant"].split()[0] for r in stored.records} == {"int8", "half"}
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
