"""How near the plan comes to what `fluxfast-bench vram` counts as alive, and what turns it red."""

import json

import pytest

from fluxfast_bench.counted import vram
from fluxfast_bench.counted.vram import Preset, measure, predict, presets, violations
from fluxfast_bench.main import main
from fluxfast_bench.report import targets
from fluxfast_bench.shapes import CONFIGS, SHAPES, Shape


@pytest.fixture
def few_blocks(monkeypatch):
    """FLUX.1's sizes in one double and two single blocks; the name of the shape."""
    monkeypatch.setitem(CONFIGS, "few", CONFIGS["flux"] | {"num_layers": 1, "num_single_layers": 2})
    for side in (32, 64):
        monkeypatch.setitem(SHAPES, f"few-{side}", Shape(f"few-{side}", "few", side, 512, 1))


@pytest.mark.parametrize("recompute", vram.RECOMPUTE)
@pytest.mark.parametrize(("base", "streamed"), [("bf16", False), ("int4", False), ("int8", True)])
@pytest.mark.parametrize("side", [32, 64])
def test_the_plan_agrees(few_blocks, base, streamed, recompute, side):
    preset = Preset(base, f"few-{side}", streamed, recompute)
    assert predict(preset) == pytest.approx(measure(preset), rel=vram.TOLERANCE)


@pytest.mark.parametrize("base", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("recompute", vram.RECOMPUTE)
def test_the_plan_agrees_on_transposed_codes(few_blocks, base, recompute):
    without, kept = (Preset(base, "few-32", False, recompute, each) for each in (False, True))
    assert predict(kept) == pytest.approx(measure(kept), rel=vram.TOLERANCE)
    # one double and two single blocks' linears, a byte a weight
    codes = 24 * 3072**2 + 2 * 24 * 3072**2 // 2
    grown = measure(kept) - measure(without)
    # a copy that is made in a step and dropped takes at most that of a double block's two groups of
    # 4 · 3072² each, which are made together
    assert codes - 8 * 3072**2 <= grown <= codes


def test_streaming_keeps_a_ring_of_blocks(few_blocks):
    resident, streamed = (measure(Preset("bf16", "few-32", s, "full")) for s in (False, True))
    # of one double and two single blocks, two slots of a double block's size
    # (modulation is in host memory either way), and of three blocks' inputs
    # all but one, which is back on the device at the peak
    double, single = (
        (339_831_296 - 113_283_072 - 36_864) * 2,
        (141_591_808 - 28_311_552 - 9_216) * 2,
    )
    kept = 1536 * 3072 * 2
    assert resident - streamed == pytest.approx(
        double + 2 * single - 2 * double + 2 * kept, abs=0.5 * kept
    )


def test_every_combination_is_a_preset():
    made = presets(vram.BASES, vram.DEFAULT_SHAPES)
    assert len(made) == len(set(made)) == 6 * 2 * 2 * 3
    wanted = targets.read(targets.TARGETS)
    limits = {p: limit for p in made if (limit := vram.limit_of(p, wanted)) is not None}
    assert len(limits) == 5 * 2 * 2 and all(p.recompute == "full" for p in limits)
    assert limits[Preset("int4", "1024px-b1", True, "full")] == 2.8
    assert targets.vram_limit(wanted, "int4", "1024px-b2", streamed=True, recompute="full") is None


def test_violations_name_the_preset():
    good = {
        "base": "int8", "shape": "512px-b1", "streamed": False, "recompute": "full",
        "gib": 10.0, "plan_gib": 10.1, "plan_error": 0.01, "limit_gib": 10.5,
    }  # fmt: skip
    assert violations([good, good | {"limit_gib": None, "gib": 99.0}]) == []
    assert violations([good | {"gib": 10.6}]) == [
        "int8 512px-b1 resident full: 10.60 GiB, at most 10.5"
    ]
    assert "the plan says" in violations([good | {"plan_error": -0.016}])[0]


def test_the_command(tmp_path, monkeypatch, capsys, few_blocks):
    class Here:
        """A pool that works here, where the fixtures are."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(vram, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(vram, "RECOMPUTE", ("full",))
    out = tmp_path / "vram.json"
    assert main(["vram", "--bases", "bf16", "--shapes", "few-32", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert [r["streamed"] for r in stored["records"]] == [False, True]
    assert f"{stored['records'][0]['gib']:.2f}" in capsys.readouterr().out

    monkeypatch.setattr(vram, "predict", lambda preset: 0)
    assert main(["vram", "--bases", "bf16", "--shapes", "few-32", "--out", str(out)]) == 1
    assert "the plan says 0.00 GiB" in capsys.readouterr().err


def test_an_unknown_base_is_named(capsys):
    assert main(["vram", "--bases", "int3"]) == 1
    assert "int3" in capsys.readouterr().err
