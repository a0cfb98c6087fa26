"""`fluxfast-bench predict`: what it stores and prints, and what the READMEs say of it."""

import json
from pathlib import Path

import pytest

from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.rates import rates_of
from fluxfast_bench.counted import counts, predict
from fluxfast_bench.main import main
from fluxfast_bench.report import counted_sections
from fluxfast_bench.report.predicted import workload_of
from fluxfast_bench.shapes import SHAPES

STORED = Path(__file__).resolve().parents[3] / "bench/results"
MODES = ("full", "none", "tread", "auto")


@pytest.fixture(scope="module")
def of_4090():
    gpu = find_gpu("RTX 4090")
    return {r["mode"]: r for r in predict.records_of([gpu], ["nf4"], ["1024px-b1"])}


def test_modes_are_in_order(of_4090):
    seconds = {mode: record["seconds"] for mode, record in of_4090.items()}
    assert tuple(seconds) == MODES
    assert seconds["tread"] < seconds["none"] < seconds["full"]
    # the budget has room for everything that blocks keep, or recomputes a little
    assert seconds["none"] <= seconds["auto"] * 1.05 <= 1.05 * seconds["full"]
    for record in of_4090.values():
        assert record["seconds"] == pytest.approx(sum(record["parts"].values()), abs=1e-3)
        assert record["compute"] == "int8" and "assumed" in record["rates"]
    assert of_4090["full"]["quickstart"] == 3.5 and of_4090["tread"]["quickstart"] is None


def test_what_does_not_fit_is_streamed():
    gpu = find_gpu("RTX 3080")
    full, _, _, auto = predict.records_of([gpu], ["bf16"], ["512px-b1"])
    assert full["seconds"] is None and full["needed_gib"] > 10
    assert auto["streamed"] and auto["seconds"] > 0 and auto["needed_gib"] < 10


@pytest.mark.parametrize(("base", "transposed"), [(None, False), ("int8", False), ("int8", True)])
def test_launches_and_bytes_are_those_of_counts(base, transposed):
    """The blocks are all of a step but its ends, so both agree within a twentieth."""
    from fluxfast.memory.block_work import block_work

    shape = SHAPES["1024px-b1"]
    compute = "same" if base is None else base
    work = workload_of(shape, base, compute=compute, adapter_itemsize=2)
    (contestant,) = [
        c
        for c in counts.CONTESTANTS
        if c.ours
        and (c.format, c.compute, c.recompute) == (base, compute, "full")
        and c.transposed_codes == transposed
    ]
    tally = counts.count(contestant, shape)
    parts = [part for i in range(57) for part in block_work(work, i, "full", "sm_90", transposed)]
    assert sum(part.launches for part in parts) == pytest.approx(tally.total_launches, rel=0.05)
    moved = sum(part.moved + sum(nbytes for nbytes, _ in part.thin) for part in parts)
    assert moved == pytest.approx(tally.bytes["memory"], rel=0.05)
    products = sum(n * count for part in parts for (_, n), count in part.products.items())
    assert products == pytest.approx(tally.bytes["gemm"], rel=0.05)


def test_the_command_stores_what_it_prints(tmp_path, capsys):
    out = tmp_path / "predict.json"
    words = ["--gpus", "H200", "--formats", "int8", "--shapes", "tiny", "--out", str(out)]
    assert main(["predict", *words]) == 0
    printed = capsys.readouterr().out
    data = json.loads(out.read_text())
    assert [record["mode"] for record in data["records"]] == list(MODES)
    assert "tiny: seconds a step, predicted" in printed
    assert "H200: from assumed rates" in printed or "H200: from measured rates" in printed
    table = counted_sections.section("predict", tmp_path)
    assert "| H200 | int8 |" in table and "fluxfast-bench predict" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "RTX 3085"], "no GPU 'RTX 3085'"),
        (["--formats", "int3"], "got 'int3'"),
        (["--shapes", "9px"], "got '9px'"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, capsys, words, said):
    assert main(["predict", *words, "--out", str(tmp_path / "p.json")]) == 1
    assert said in capsys.readouterr().err


def test_the_stored_table_has_every_gpu_format_and_size():
    """What bench/README.md shows, and whether its rates are still said to be what they are."""
    records = json.loads((STORED / "predict.json").read_text())["records"]
    found = {(r["gpu"], r["format"], r["case"], r["mode"]) for r in records}
    assert found == {
        (find_gpu(gpu).name, base, case, mode)
        for gpu in predict.DEFAULT_GPUS
        for base in predict.BASES
        for case in predict.DEFAULT_SHAPES
        for mode in MODES
    }
    for gpu in predict.DEFAULT_GPUS:
        measured = any(rate.measured for rate in rates_of(find_gpu(gpu)).values())
        said = {r["rates"] for r in records if r["gpu"] == gpu}
        assert all(("none measured" in words) != measured for words in said)
