"""The arithmetic of the quality bench, and what its guard turns red."""

from pathlib import Path

import pytest
from quality_cases import FP32, alone, runs, shifted

from fluxfast_bench.quality import guard
from fluxfast_bench.quality.modes import MODES
from fluxfast_bench.quality.summary import rows_of
from fluxfast_bench.report import targets
from fluxfast_bench.report.verdict import MET, MISSED, UNMEASURED

ROOT = Path(__file__).resolve().parents[3]
WANTED = {
    "noise": 2.0,
    "within_noise": ["int8 base"],
    "score_below": 10,
    "loss_above": {"nf4 base": 0.02},
}


def verdict(records, name):
    (found,) = [each for each in guard.verdicts(records, WANTED) if each.name == name]
    return found


def test_means_and_spreads_are_those_of_the_seeds():
    rows = rows_of([alone(), *runs("int8 base", (0.50, 0.52, 0.54)), *runs("fp32")])
    assert list(rows) == ["fp32", "int8 base"]
    row = rows["int8 base"]
    assert row.loss.mean == pytest.approx(0.52) and row.loss.deviation == pytest.approx(0.02)
    # seed by seed: 0.01, 0.02, 0.03
    assert row.loss_difference.mean == pytest.approx(0.02)
    assert row.loss_difference.deviation == pytest.approx(0.01)
    assert rows["fp32"].loss_difference.values == (0.0, 0.0, 0.0)


def test_seeds_are_paired_by_number_and_not_by_place():
    late, early = runs("int8 base", shifted(0.001))[1:], runs("fp32")[:2]
    row = rows_of(late[::-1] + early)["int8 base"]
    assert row.loss.values == pytest.approx((0.501, 0.511))
    # of the second seed alone, which both have
    assert row.loss_difference.values == pytest.approx((0.001,))


def test_a_mode_is_compared_with_its_own_reference():
    name = "attention native-flash"
    records = [*runs("fp32"), *runs("bf16 without mask", shifted(0.1)), *runs(name, shifted(0.11))]
    assert rows_of(records)[name].loss_difference.mean == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("by", "expected"), [(0.019, MET), (-0.019, MET), (0.021, MISSED), (-0.021, MISSED)]
)
def test_noise_is_so_many_deviations_of_fp32s_seeds(by, expected):
    found = verdict([*runs("fp32"), *runs("int8 base", shifted(by))], "int8 base: evaluation loss")
    assert found.verdict == expected
    assert found.found == f"{by:+.4f}" and "0.0200" in found.wanted and found.where == "3 seeds"


@pytest.mark.parametrize(("by", "expected"), [(0.0099, MET), (-0.3, MET), (0.0101, MISSED)])
def test_a_stated_loss_is_a_share_of_fp32s(by, expected):
    found = verdict([*runs("fp32"), *runs("nf4 base", shifted(by))], "nf4 base: evaluation loss")
    assert found.verdict == expected and "at most 2.0% above fp32's" in found.wanted


@pytest.mark.parametrize(("concept", "expected"), [(0.8, MET), (1.0, MET), (0.79, MISSED)])
def test_the_score_may_be_so_many_points_lower(concept, expected):
    records = [*runs("fp32", concept=0.9), *runs("nf4 base", concept=concept)]
    assert verdict(records, "nf4 base: score of the new concept").verdict == expected


def test_what_must_change_nothing_has_the_references_bits_with_every_seed():
    name = "recompute full: the LoRA's bits"
    same = runs("recompute full", digest="fp32")
    assert verdict([*runs("fp32"), *same], name).verdict == MET
    same[1]["digest"] = "another"
    found = verdict([*runs("fp32"), *same], name)
    assert found.verdict == MISSED and found.found == "the same with 2 of 3 seeds"


def test_what_broke_off_is_red_and_what_cannot_be_is_not():
    records = [
        *runs("fp32"),
        {"mode": "TREAD", "seed": 2, "failed": "RuntimeError: no"},
        {"mode": "int8 base", "reason": "no such machine"},
    ]
    found = guard.verdicts(records, WANTED)
    (red,) = [each for each in found if each.red]
    assert (red.name, red.where, red.found) == ("TREAD: runs", "seed 2", "RuntimeError: no")
    assert guard.of_mode(found, "TREAD") == [red]
    (unable,) = [each for each in found if each.found == "no such machine"][:1]
    assert unable.verdict == UNMEASURED and unable.name.startswith("int8 base: ")


def test_nothing_measured_has_not_passed():
    found = guard.verdicts([], WANTED)
    equal = sum(mode.is_equal for mode in MODES.values())
    assert [each.verdict for each in found] == [UNMEASURED] * (2 * 2 + equal)


def test_the_promises_are_about_modes_that_there_are():
    wanted = targets.read(ROOT / "bench" / "targets.toml")["quality"]
    guard.check_names(wanted)
    with pytest.raises(ValueError, match="int9 base"):
        guard.check_names(wanted | {"within_noise": ["int9 base"]})


def test_the_seeds_that_the_tests_have():
    row = rows_of(runs("fp32"))["fp32"]
    assert row.loss.values == FP32
    assert row.loss.mean == pytest.approx(0.5) and row.loss.deviation == pytest.approx(0.01)
