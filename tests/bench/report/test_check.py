"""`fluxfast-bench check`: what turns red."""

import copy
import json
from pathlib import Path

import pytest
from stored_runs import record, run_of, store

from fluxfast_bench.main import main
from fluxfast_bench.quality import guard
from fluxfast_bench.report import check, results, targets
from fluxfast_bench.report.conditions import repeatable, slug
from fluxfast_bench.step.worker import CONTESTANTS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def wanted():
    return targets.read(ROOT / "bench" / "targets.toml")


def found(verdicts, name):
    (line,) = [v for v in verdicts if v.name == name and "1024" in v.where]
    return line


EAGER = "bf16, checkpointed, against diffusers + PEFT eager"


def test_nothing_measured_is_not_passed(tmp_path, wanted, capsys):
    verdicts = check.verdicts_of([], wanted)
    assert {v.verdict for v in verdicts} == {check.UNMEASURED}
    steps = 2 * len(wanted["counts"]["steps"])
    quality = len(guard.verdicts([], wanted["quality"]))
    assert len(verdicts) == len(wanted["ratio"]) + 1 + 20 + 3 + steps + 2 + quality
    assert (
        main(
            ["check", "--results", str(tmp_path), "--targets", str(ROOT / "bench" / "targets.toml")]
        )
        == 0
    )
    assert f"0 met, 0 missed, 0 worse, {len(verdicts)} not measured" in capsys.readouterr().out


def test_a_target_tightened_turns_red(tmp_path, wanted):
    stored = store(
        tmp_path,
        run_of(
            record("diffusers:full", 1.5),
            record("fluxfast+graphs:full", 1.0, ratios={"diffusers:full": 1.5}),
        ),
    )
    verdicts = check.verdicts_of(stored, wanted)
    assert found(verdicts, EAGER).verdict == check.MET
    assert found(verdicts, "fluxfast+graphs:full, share of the floor's rate").verdict == check.MET
    assert found(verdicts, "peak VRAM, bf16, resident").verdict == check.MET
    assert not any(v.red for v in verdicts)
    tight = copy.deepcopy(wanted)
    (
        tight["ratio"][0]["at_least"],
        tight["floor"]["at_least"],
        tight["vram"]["bf16"]["resident-1024"],
    ) = 1.51, 0.81, 14.9
    verdicts = check.verdicts_of(stored, tight)
    assert found(verdicts, EAGER).verdict == check.MISSED
    assert (
        found(verdicts, "fluxfast+graphs:full, share of the floor's rate").verdict == check.MISSED
    )
    assert found(verdicts, "peak VRAM, bf16, resident").verdict == check.MISSED
    assert sum(v.red for v in verdicts) == 3


def test_the_command_fails_where_a_target_is_missed(tmp_path, capsys):
    store(tmp_path, run_of(record("fluxfast+graphs:full", 1.0, ratios={"diffusers:full": 1.39})))
    assert (
        main(
            ["check", "--results", str(tmp_path), "--targets", str(ROOT / "bench" / "targets.toml")]
        )
        == 1
    )
    assert "1 missed" in capsys.readouterr().out


def test_the_quality_of_a_mode_is_checked(tmp_path, wanted):
    runs = [
        {"mode": mode, "seed": seed, "loss": loss, "concept": 1.0, "old": 1.0, "digest": ""}
        for mode, losses in (("fp32", (0.4, 0.5)), ("nf4 base", (0.5, 0.6)))
        for seed, loss in enumerate(losses)
    ]
    (tmp_path / "quality.json").write_text(json.dumps({"records": runs}))
    verdicts = check.verdicts_of([], wanted, results.read_counted(tmp_path))
    (red,) = [each for each in verdicts if each.red]
    assert red.name == "nf4 base: evaluation loss" and red.found == "+0.1000"


def test_the_newest_measurement_counts(tmp_path, wanted):
    old, new = (
        record("fluxfast+graphs:full", 1.0, ratios={"diffusers:full": ratio})
        for ratio in (1.3, 1.5)
    )
    failed = record("fluxfast+graphs:full", 1, reason="failed")
    stored = store(tmp_path, run_of(new, day=3), run_of(old, day=2), run_of(failed, day=4))
    assert found(check.verdicts_of(stored, wanted), EAGER).found == "1.50"


def test_targets_hold_for_each_device_of_a_group(tmp_path, wanted):
    def run(device, ratio):
        made = run_of(record("fluxfast+graphs:full", 1.0, ratios={"diffusers:full": ratio}))
        made["conditions"] = made["conditions"] | {"device": device}
        return made

    stored = store(
        tmp_path,
        run("NVIDIA H100 80GB HBM3", 1.5),
        run("NVIDIA H200", 1.3),
        run("NVIDIA A100-SXM4-80GB", 1.0),
    )
    lines = [v for v in check.verdicts_of(stored, wanted) if v.name == EAGER]
    assert {(line.where, line.verdict) for line in lines} == {
        ("nvidia-h200, 1024px-b1", check.MISSED),
        ("nvidia-h100-80gb-hbm3, 1024px-b1", check.MET),
    }


@pytest.mark.parametrize(("seconds", "red"), [(1.04, False), (1.06, True), (0.5, False)])
def test_worse_than_the_last_run_on_the_device(tmp_path, seconds, red):
    stored = store(
        tmp_path,
        run_of(record("fluxfast:full", 1.0)),
        run_of(record("fluxfast:full", seconds), day=2),
    )
    lines = list(check.regressions(stored))
    assert [line.name for line in lines] == (
        ["step 1024px-b1 fluxfast:full seconds"] if red else []
    )


def test_another_device_and_a_peer_are_no_regression(tmp_path):
    other = run_of(record("fluxfast:full", 9.0), day=2) | {}
    other["conditions"]["device"] = "NVIDIA L4"
    runs = [
        run_of(record("fluxfast:full", 1.0), record("diffusers:full", 1.0)),
        other,
        run_of(record("diffusers:full", 9.0), day=3),
    ]
    assert not list(check.regressions(store(tmp_path, *runs)))


def test_on_a_cpu_ratios_are_compared_and_times_are_not(tmp_path, wanted):
    runs = [
        run_of(
            record("fluxfast:none", seconds, case="small-b2", ratios={"diffusers:none": ratio}),
            day=day,
            device="Some CPU",
        )
        for day, seconds, ratio in ((1, 1.0, 1.5), (2, 3.0, 1.4))
    ]
    stored = store(tmp_path, *runs)
    assert [line.name for line in check.regressions(stored)] == [
        "step small-b2 fluxfast:none vs diffusers:none"
    ]
    (line,) = [
        v
        for v in check.verdicts_of(stored, wanted)
        if v.name == "the small model in fp32, against diffusers + PEFT"
    ]
    assert (line.verdict, line.found) == (check.MET, "1.40")


def test_every_target_names_contestants_that_there_are(wanted):
    names = {
        target[key].partition(":")[0] for target in wanted["ratio"] for key in ("ours", "peer")
    }
    assert names - set(CONTESTANTS) == set()


def test_guards_run_their_commands(monkeypatch):
    ran = []

    def guard(status):
        return lambda argv: ran.append(argv) or status

    monkeypatch.setattr("fluxfast_bench.counted.aot.main", guard(0))
    monkeypatch.setattr("fluxfast_bench.report.check.main", guard(1))
    lines = list(check.guard_verdicts({"aot": ("counted.aot", ""), "vram": ("report.check", "")}))
    assert [line.verdict for line in lines] == [check.MET, check.MISSED, check.UNMEASURED]
    assert ran[0][:2] == ["--sample", "1"]
    # beside the stored results, which a guard leaves as they are
    assert all(argv[-2] == "--out" and not argv[-1].startswith("bench/") for argv in ran)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio = [", "targets.toml: "),
        ("a = 1", "expected the tables"),
        (None, "not found; run this in"),
    ],
)
def test_targets_that_can_not_be_read(tmp_path, text, message):
    path = tmp_path / "targets.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        targets.read(path)


def test_device_names_as_folders():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads") == "intel-xeon-cpu-2-20ghz-2-threads"


def test_every_format_is_held_to_the_startup_targets():
    def run(date, **copies):
        records = [
            {
                "contestant": f"quantise {name}",
                "ours": True,
                "case": "24 GB",
                "extra_gib": 0.5,
                "times_copy": times,
            }
            for name, times in copies.items()
        ]
        return results.Result(
            "cpu", Path("x"), {"kind": "startup", "conditions": {"date": date}, "records": records}
        )

    stored = [run("2026-01-01", int8=2.0, int2=2.0), run("2026-01-02", int8=1.1)]
    verdicts = list(check.startup_verdicts(stored, {"extra_gib": 3.0, "times_copy": 1.3}))
    red = [v for v in verdicts if v.red]
    assert (
        len(verdicts) == 4
        and len(red) == 1
        and "quantise int2" in red[0].name
        and red[0].found == "2.00"
    )


def test_a_stored_command_names_no_place_of_its_machine():
    words = [
        "startup",
        "--checkpoint",
        "/home/someone/ck",
        "--results",
        "/tmp/x",
        "--formats",
        "int8",
    ]
    assert repeatable(words) == "fluxfast-bench startup --checkpoint ck --formats int8"


def test_a_ratio_to_another_of_ours_is_no_regression(tmp_path):
    runs = [
        run_of(
            record("fluxfast:none", 1.0, ratios={"fluxfast-int8:none": ratio}),
            record("fluxfast-int8:none", ratio),
            day=day,
            device="A CPU",
        )
        for day, ratio in ((1, 1.5), (2, 1.1))
    ]
    assert not list(check.regressions(store(tmp_path, *runs)))


def counted_figures():
    step = {
        "case": "1024px-b1",
        "contestant": "fluxfast, int8",
        "ours": True,
        "launches": 2590,
        "memory_ratio": 0.17,
        "launch_ratio": 0.17,
    }
    preset = {
        "base": "int4",
        "shape": "512px-b1",
        "streamed": False,
        "recompute": "full",
        "gib": 5.7,
    }
    return {
        "vram": [preset, preset | {"recompute": "none", "gib": 99.0}],
        "counts": [step, step | {"ours": False, "launch_ratio": 1.0}],
        "aot": [{"spills": 0}],
    }


# limits of one step alone
INT8_STEP = {
    "case": "1024px-b1",
    "contestant": "fluxfast, int8",
    "launches": 2600,
    "memory_ratio": 0.18,
}


@pytest.mark.parametrize(
    ("table", "key", "value", "name"),
    [
        ("vram", "int4", {"resident-512": 5.6}, "peak VRAM, int4, resident"),
        ("counts", "launches", 0.16, "launches of a step, of eager diffusers + PEFT's"),
        ("counts", "bytes", 0.16, "bytes of a step, of eager diffusers + PEFT's"),
        ("counts", "steps", [INT8_STEP | {"launches": 2589}], "launches"),
        ("counts", "steps", [INT8_STEP | {"memory_ratio": 0.16}], "bytes, of eager's"),
    ],
)
def test_a_counted_target_tightened_turns_red(wanted, table, key, value, name):
    counted = counted_figures()
    assert not any(v.red for v in check.verdicts_of([], wanted, counted))
    tight = copy.deepcopy(wanted)
    tight[table][key] = value
    assert [v.name for v in check.verdicts_of([], tight, counted) if v.red] == [name]


@pytest.mark.parametrize("variant", [{"spills": 4}, {"error": "out of registers"}])
def test_a_kernel_that_spills_turns_red(wanted, variant):
    counted = counted_figures() | {"aot": [{"spills": 0}, variant]}
    (line,) = [v for v in check.verdicts_of([], wanted, counted) if v.red]
    assert line.found == "1 of 2"


def test_what_a_device_measured_goes_before_what_was_counted(tmp_path, wanted):
    preset = counted_figures()["vram"][0] | {"base": "bf16", "shape": "1024px-b1", "gib": 1.0}
    stored = store(tmp_path, run_of(record("fluxfast:full", 1.0)))
    assert (
        found(
            check.verdicts_of(stored, wanted, {"vram": [preset]}), "peak VRAM, bf16, resident"
        ).found
        == "15.00 GiB"
    )


def test_a_damaged_count_is_named(tmp_path):
    (tmp_path / "vram.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vram\.json: not what fluxfast-bench vram writes"):
        results.read_counted(tmp_path)
