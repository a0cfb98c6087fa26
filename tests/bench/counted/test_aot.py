"""`fluxfast-bench aot`: what it compiles, what it stores, and what turns it red."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import aot_kernels
import pytest

from fluxfast_bench.counted import aot
from fluxfast_bench.counted.compilers import (
    SHARED_LIMITS,
    Compiled,
    Compilers,
    Task,
    Worker,
    prepare_worker,
)
from fluxfast_bench.main import main

GOOD = Compiled(seconds=0.5, registers=32, spills=0, shared=128)
TASKS = [
    Task("gelu", f"variant-{i}", target)
    for target in ("sm_80", "sm_90", "gfx942")
    for i in range(5)
]


@pytest.fixture
def compiled(monkeypatch):
    """What the compilers say from now on of gelu's variants, which are TASKS: to be changed."""
    outcome = dict.fromkeys(TASKS, GOOD)
    monkeypatch.setattr(Compilers, "__init__", lambda self, jobs, prepare, arguments: None)
    monkeypatch.setattr(Compilers, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(
        Compilers, "tasks", lambda self, op: [task for task in outcome if task.op == op]
    )
    monkeypatch.setattr(
        Compilers,
        "compile",
        lambda self, tasks: ((task, outcome[task]) for task in reversed(tasks)),
    )
    return outcome


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(prepare_worker, (str(tmp_path_factory.mktemp("cache")),))
    yield worker
    worker.close()


def run_aot(path, *options):
    return main(["aot", "--ops", "gelu", "--out", str(path), *options])


def stored(path):
    """The stored variants by task, and the runs."""
    data = json.loads(path.read_text())
    return {Task(v["op"], v["variant"], v["target"]): v for v in data["variants"]}, data["runs"]


def test_a_sample_really_compiles(tmp_path, capsys):
    out = tmp_path / "results" / "aot.json"
    options = [
        "--ops",
        "token_route,row_quant",
        "--targets",
        "sm_90,gfx942",
        "--sample",
        "1",
        "--jobs",
        "1",
    ]
    assert main(["aot", *options, "--out", str(out)]) == 0
    variants, runs = stored(out)
    assert [(t.op, t.target) for t in variants] == [
        (op, t) for op in ("row_quant", "token_route") for t in ("gfx942", "sm_90")
    ]
    for line in variants.values():
        assert 8 <= line["registers"] <= 255 and line["spills"] == 0 and 0 <= line["shared"] < 4096
        assert line["seconds"] > 0 and "error" not in line
        run = runs[line["run"]]
        assert run["command"].startswith("fluxfast-bench aot --ops token_route,row_quant ")
        assert run["triton"] and run["commit"]
    # a row's amax is shared between its warps; tokens are only copied
    assert variants[next(t for t in variants if t.op == "row_quant")]["shared"] > 0
    table = [
        row.replace("│", " ").split()
        for row in capsys.readouterr().out.splitlines()
        if "token_route" in row
    ]
    assert [row[:4] for row in table] == [["token_route", t, "1", "0"] for t in ("gfx942", "sm_90")]


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])
def test_a_kernel_that_spills_is_seen_to(worker, target):
    few = worker.call(aot_kernels.measure_kernel, "hoard", 1024, target)
    many = worker.call(aot_kernels.measure_kernel, "hoard", 8192, target)
    assert (few.spills, few.error) == (0, None)
    assert many.spills > 0 and many.registers > few.registers


def test_a_kernel_that_does_not_compile(worker):
    result = worker.call(aot_kernels.measure_kernel, "misspelt", 64, "sm_80")
    assert "no_such_name" in result.error
    assert result.registers is result.spills is result.shared is None


def test_a_kernel_that_needs_too_much_shared_memory(worker):
    fits, too_big = (
        worker.call(aot_kernels.measure_kernel, "square", block, "gfx942") for block in (32, 256)
    )
    assert fits.error is None and fits.shared <= SHARED_LIMITS["gfx942"]
    assert (
        too_big.shared > SHARED_LIMITS["gfx942"]
        and "shared memory, gfx942 has 65536" in too_big.error
    )


def test_a_crash_takes_one_worker_and_no_more(tmp_path):
    worker = Worker(prepare_worker, (str(tmp_path),))
    try:
        with pytest.raises(BrokenProcessPool):
            worker.call(os._exit, 3)
        assert worker.call(sum, [1, 2]) == 3
    finally:
        worker.close()


def test_no_worker_outlives_the_command(tmp_path):
    killed = (
        "import os, signal, sys\n"
        f"sys.path[:] = {sys.path}\n"
        "from fluxfast_bench.counted.compilers import Worker, prepare_worker\n"
        f"print(Worker(prepare_worker, ({str(tmp_path)!r},)).call(os.getpid), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # returns when nobody holds stdout any more, which the worker inherits
    process = subprocess.run(
        [sys.executable, "-c", killed], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert int(process.stdout) > 0


def test_a_crash_is_a_failed_variant(tmp_path, monkeypatch):
    def call(self, function, task):
        if task == TASKS[1]:
            raise BrokenProcessPool
        return GOOD

    monkeypatch.setattr(Worker, "call", call)
    with Compilers(2, prepare_worker, (str(tmp_path),)) as compilers:
        results = dict(compilers.compile(TASKS))
    assert sorted(results) == sorted(TASKS)
    assert {task for task in TASKS if results[task] != GOOD} == {TASKS[1]}
    assert results[TASKS[1]].error == "the compiler crashed"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (replace(GOOD, spills=4), "spills 4"),
        (
            Compiled(seconds=1.0, error="CompilationError: no such thing"),
            "CompilationError: no such thing",
        ),
        (replace(GOOD, shared=232449, error="needs 232449 bytes"), "needs 232449 bytes"),
    ],
)
def test_one_bad_variant_is_a_red_run(compiled, tmp_path, capsys, bad, said):
    out = tmp_path / "aot.json"
    assert run_aot(out) == 0
    compiled[TASKS[7]] = bad
    assert run_aot(out) == 1
    assert f"gelu {TASKS[7].variant} {TASKS[7].target}: {said}" in capsys.readouterr().out
    line = stored(out)[0][TASKS[7]]
    assert (line.get("error"), line.get("spills")) == (bad.error, bad.spills)
    # what wasn't run again can't be red
    assert run_aot(out, "--targets", "sm_80") == 0


def test_a_part_leaves_the_rest(compiled, tmp_path):
    out = tmp_path / "aot.json"
    assert run_aot(out) == 0
    first, (first_run,) = stored(out)
    foreign = {**first[TASKS[0]], "op": "qk_norm_rope"}
    gone = {**first[TASKS[0]], "op": "an_op_that_was_removed"}
    data = json.loads(out.read_text())
    # written by an earlier run than any of today's
    data["runs"] = {"2020-01-01T00:00:00Z": data["runs"][first_run]}
    data["variants"] = [
        {**line, "run": "2020-01-01T00:00:00Z"} for line in [*data["variants"], foreign, gone]
    ]
    out.write_text(json.dumps(data))
    compiled.update(dict.fromkeys(TASKS, replace(GOOD, registers=40)))
    del compiled[TASKS[0]]
    assert run_aot(out, "--targets", "sm_80", "--sample", "2") == 0
    second, runs = stored(out)
    # TASKS[0] is no variant any more; of the four others, two were compiled
    assert set(second) == set(TASKS[1:]) | {Task("qk_norm_rope", TASKS[0].variant, "sm_80")}
    again = [task for task, line in second.items() if line["registers"] == 40]
    assert len(again) == 2 and {task.target for task in again} == {"sm_80"}
    assert {second[task]["run"] for task in set(second) - set(again)} == {"2020-01-01T00:00:00Z"}
    assert list(second) == sorted(second) and len(runs) == 2
    # a run whose every line was replaced is forgotten
    assert main(["aot", "--ops", "gelu,qk_norm_rope", "--out", str(out)]) == 0
    assert "2020-01-01T00:00:00Z" not in stored(out)[1]


def test_samples_are_spread_evenly():
    assert aot.spread(list(range(10)), 2) == [2, 7]
    assert aot.spread(list(range(10)), 1) == [5]
    assert aot.spread(list(range(3)), 5) == [0, 1, 2]


def test_every_target_has_its_limit():
    from fluxfast_kernels.aot import AOT_TARGETS

    assert list(SHARED_LIMITS) == list(AOT_TARGETS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ops", "gelu,relu"], "--ops: expected one of "),
        (["--targets", "sm_9"], "did you mean 'sm_90'?"),
        (["--sample", "0"], "--sample: expected 1 or more, got 0"),
        (["--jobs", "0"], "--jobs: expected 1 or more, got 0"),
    ],
)
def test_bad_requests(options, said, tmp_path, capsys):
    assert main(["aot", "--out", str(tmp_path / "aot.json"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "aot.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": {}}'])
def test_a_file_of_something_else_is_left_alone(tmp_path, capsys, text):
    out = tmp_path / "aot.json"
    out.write_text(text)
    assert run_aot(out) == 1
    assert f"{out}: not a result of" in capsys.readouterr().err
    assert out.read_text() == text


@pytest.mark.parametrize("words", [["--help"], ["help"]])
def test_help_names_the_commands(words, capsys):
    assert main(words) == 0
    assert "\n  aot " in capsys.readouterr().out


def test_without_a_command(capsys):
    assert main([]) == main(["no-such-command"]) == 2
    assert "\n  aot " in capsys.readouterr().err
    assert main(["--version"]) == 0
    with pytest.raises(SystemExit) as exit_:
        main(["aot", "--help"])
    assert exit_.value.code == 0
    assert "--sample" in capsys.readouterr().out
