"""What `fluxfast-bench adapters` predicts, and what turns it red."""

import json

import pytest

from fluxfast.memory.gpus import find_gpu
from fluxfast_bench.counted import adapters
from fluxfast_bench.counted.adapters import ADAPTERS, BASELINE, record_of, violations
from fluxfast_bench.main import main
from fluxfast_bench.report import targets
from fluxfast_bench.step.contestants import rank_equivalent

H100 = find_gpu("H100")


def test_lokr_costs_what_was_promised():
    limits = targets.read(targets.TARGETS)["adapters"]
    assert limits.keys() < ADAPTERS.keys()
    records = list(adapters.records_of([H100], ["bf16"], ["1024px-b1"]))
    assert [r["adapter"] for r in records] == list(ADAPTERS)
    assert records[0]["ratio"] == 1 and all(r["ratio"] > 1 for r in records[1:])
    assert violations(records, limits) == []
    # both factors of 3072 x 3072, of the MLP's, and of the model's own proj_out, 64 x 3072
    by_name = {r["adapter"]: r["elements"] for r in records}
    square, up, down, out = 256 + 192 * 192, 256 + 192 * 768, 256 + 192 * 960, 64 + 16 * 192
    blocks = 19 * (8 * square + 4 * up) + 38 * (3 * square + up + down)
    assert by_name["LoKr, factor 16"] == blocks + out


def test_a_larger_factor_of_the_weight_costs_more():
    seconds = [
        record_of(name, H100, "int8", "1024px-b1")["seconds"]
        for name in (BASELINE, "LoKr, factor 16", "LoKr, factor 12", "LoKr, factor 8")
    ]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4


@pytest.mark.parametrize(
    ("shapes", "factor"),
    # a block of FLUX.1's widths and one of the small model's: squares, and both linears of the MLP
    [
        ([(3072, 3072)] * 4 + [(12288, 3072), (3072, 12288)], 12),
        ([(128, 128)] * 4 + [(512, 128), (128, 512)], 2),
    ],
)
def test_a_lokr_of_as_many_numbers(shapes, factor):
    assert rank_equivalent(shapes, 16).factor == factor


def test_what_turns_it_red(tmp_path, capsys):
    limits = tmp_path / "targets.toml"
    text = targets.TARGETS.read_text()
    limits.write_text(text.replace('"LoKr, factor 16" = 1.15', '"LoKr, factor 16" = 1.01'))
    out = tmp_path / "adapters.json"
    arguments = ["adapters", "--gpus", "RTX 4090", "--shapes", "512px-b1", "--formats", "bf16"]
    assert main([*arguments, "--out", str(out), "--targets", str(limits)]) == 1
    assert "LoKr, factor 16: 1.0" in capsys.readouterr().err
    stored = json.loads(out.read_text())["records"]
    assert [r["adapter"] for r in stored] == list(ADAPTERS)
    assert main([*arguments, "--out", str(out)]) == 0


@pytest.mark.parametrize("option", ["--gpus", "--shapes", "--formats"])
def test_unknown_names(option, tmp_path, capsys):
    out = tmp_path / "adapters.json"
    assert main(["adapters", option, "nothing", "--out", str(out)]) == 1
    assert "nothing" in capsys.readouterr().err and not out.exists()
