"""`bench/gpu.sh`: its limits add up, its contestants exist, and it leaves its files when killed."""

import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from fluxfast_bench.step.worker import CONTESTANTS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
# in the place of Python: says what it was asked for, and hangs where it is told to
STUB = """#!/usr/bin/env bash
words="$*"
echo "asked: ${words##*.socket}"
echo '{"a": 1}' >"$results/figure.jsonl"
if [[ -n "${HANG:-}" && "$words" == *"$HANG"* ]]; then sleep 300; fi
if [[ -n "${FAIL:-}" && "$words" == *"$FAIL"* ]]; then echo "went wrong"; exit 3; fi
"""


@pytest.fixture
def start(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def start(part="first", **env):
        env = os.environ | {"PYTHON": str(stub), "WORK": str(tmp_path / "work"), "SMALL": "1"} | env
        words = [tmp_path / "out", *(part or "").split()]
        # a shell ignores SIGINT for good where it was started in the background of another
        return subprocess.Popen(
            ["bash", SCRIPT, *words],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


def result(tmp_path, part="first"):
    """The page, and the names in the archive: the only two files."""
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"fluxfast-gpu-{part}.md", f"fluxfast-gpu-{part}.tar.gz"]
    with tarfile.open(tmp_path / "out" / names[1]) as archive:
        found = {name.removeprefix("./") for name in archive.getnames()}
    return (tmp_path / "out" / names[0]).read_text(), found


def wait_for(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.05)


def plan(**env):
    lines = subprocess.run(
        ["bash", SCRIPT, "plan"], env=os.environ | env, capture_output=True, text=True, check=True
    ).stdout
    return [line.split() for line in lines.splitlines()]


def test_both_parts_take_less_than_ten_minutes():
    stages = plan()
    for part in ("first", "second"):
        limits = [
            int(limit)
            for of, name, limit in stages
            if of == part and name != "total" and limit != "left"
        ]
        (total,) = [int(limit) for of, name, limit in stages if (of, name) == (part, "total")]
        assert sum(limits) < total < 400
    assert (
        sum(
            int(limit)
            for of, name, limit in stages
            if name == "total" and of in ("first", "second")
        )
        < 600
    )


def test_its_contestants_exist():
    text = SCRIPT.read_text().replace("$ours", "fluxfast-int8+int8")
    lists = re.findall(r'--contestants "?([\w+,:-]+)', text) + re.findall(r"smoked=(\S+)", text)
    names = {name.partition(":")[0] for names in lists for name in names.split(",")}
    assert len(names) > 12 and names <= set(CONTESTANTS)


def test_every_stage_runs_and_the_page_says_so(start, tmp_path):
    process = start(FAIL="main ceilings")
    assert process.wait(timeout=60) == 0
    page, archive = result(tmp_path)
    stages = [
        line.split("|")[1].strip()
        for line in page.splitlines()
        if line.startswith("| ") and " | ok | " in line
    ]
    assert stages == [
        name for part, name, _ in plan() if part == "first" and name not in ("total", "ceilings")
    ]
    assert "| ceilings | failed (3) |" in page and "went wrong" in page
    assert {"logs/profile.log", "results/figure.jsonl", "summary.md"} <= archive


def test_a_stage_out_of_time_costs_itself_alone(start, tmp_path):
    begun = time.monotonic()
    # what is left after the closing seconds is the limit of whoever hangs
    process = start(HANG="smoke", BUDGET="28")
    assert process.wait(timeout=60) == 0
    page, archive = result(tmp_path)
    assert re.search(r"\| prewarm \| ok \|", page) and re.search(
        r"\| smoke \| out of time after [678] s \|", page
    )
    assert "| smoke-short | no time left |" in page and time.monotonic() - begun < 40
    assert "results/figure.jsonl" in archive and "logs/smoke.log" in archive


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_page_and_archive(start, tmp_path, sent):
    process = start(HANG="profile")
    wait_for(tmp_path / "work" / "first" / "logs" / "profile.log")
    process.send_signal(sent)
    assert process.wait(timeout=30) == 143
    page, archive = result(tmp_path)
    assert f"stopped by {sent.name}" in page and "| int8 | ok |" in page and "| tests |" not in page
    assert "results/figure.jsonl" in archive


def test_the_second_part_has_the_first_ones_results(start, tmp_path):
    assert start().wait(timeout=60) == 0
    (tmp_path / "work" / "first" / "results" / "ceilings.json").write_text("{}")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert start("second").wait(timeout=60) == 0
    _, archive = result(tmp_path, "second")
    assert "results/ceilings.json" in archive


def test_stages_can_be_picked(start, tmp_path):
    assert start("setup profile int8").wait(timeout=60) == 0
    page, _ = result(tmp_path, "picked")
    assert re.findall(r"^\| ([\w-]+) \| ok", page, re.MULTILINE) == [
        "setup",
        "imports",
        "profile",
        "int8",
    ]


def test_without_a_part_it_is_the_first_and_the_second(start, tmp_path):
    assert start(part=None).wait(timeout=60) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        f"fluxfast-gpu-{part}.{ending}"
        for part in ("first", "second")
        for ending in ("md", "tar.gz")
    ]
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "work")
    process = start(part=None, HANG="profile")
    wait_for(tmp_path / "work" / "first" / "logs" / "profile.log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    page, _ = result(tmp_path)
    assert "stopped by SIGTERM" in page


@pytest.mark.parametrize("arguments", [[], ["out", "third"]])
def test_it_says_how_it_is_used(arguments):
    process = subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "usage: bench/gpu.sh" in process.stderr
