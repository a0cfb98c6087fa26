"""The bench beside other programs: they are noticed, told and stored, and nothing impossible is a
result.
"""

import io
import os
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from fluxfast_bench import machine_load, progress, run
from fluxfast_bench.machine_load import Load, told_busy
from fluxfast_bench.main import main
from fluxfast_bench.ops.timings import table_of as ops_table
from fluxfast_bench.progress import Steps, in_turn
from fluxfast_bench.report import results
from fluxfast_bench.report.markdown import conditions_line
from fluxfast_bench.run import Run
from fluxfast_bench.timing import MOST_OF_PRODUCTS, share_of, share_told

CPU = torch.device("cpu")
Times = namedtuple("Times", "user system idle iowait steal guest guest_nice")
Spent = namedtuple("Spent", "user system children_user children_system")


@pytest.fixture
def machine(monkeypatch):
    """A machine whose clock, cores and processes stand still until a test moves them."""
    state = SimpleNamespace(
        clock=100.0,
        all=dict.fromkeys(Times._fields, 10.0),
        own=Spent(1.0, 1.0, 0.0, 0.0),
        child=None,
    )

    class Process:
        def children(self, recursive):
            assert recursive
            return [] if state.child is None else [SimpleNamespace(cpu_times=lambda: state.child)]

        def cpu_times(self):
            return state.own

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(**state.all))
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(machine_load.time, "monotonic", lambda: state.clock)
    return state


def test_what_others_take_is_what_is_neither_idle_nor_ours(machine):
    load = Load()
    machine.clock += 10
    machine.all |= {"user": 22.0, "idle": 15.0, "iowait": 12.0, "steal": 11.0}
    # a guest's time is in user, too
    machine.all |= {"guest": 13.0}
    machine.own = Spent(4.0, 1.5, 0.5, 0.0)
    machine.child = Spent(1.0, 0.0, 0.5, 0.5)
    # 13 s of work, of which 4 are this process's and 2 its child's
    assert load.others() == 0.7
    # an instant later, by rounding, we seem to have worked more than the machine
    machine.own = Spent(40.0, 0.0, 0.0, 0.0)
    assert load.others() == 0.0


def test_a_program_beside_this_one_is_seen():
    load = Load()
    # its parent ends at once, so that it is no child of this process
    busy = """
import os, time
if os.fork() == 0:
    end = time.time() + 1.2
    while time.time() < end: pass
"""
    subprocess.run([sys.executable, "-c", busy], check=True)
    begun = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - begun < 0.5
    # on a machine with more to do than cores it gets a part of one
    assert load.others() > 0.3


def test_a_quiet_machine_is_not_mentioned_and_a_busy_one_is():
    assert told_busy(machine_load.QUIET, "before") is None
    line = told_busy(1.3, "before the first measurement")
    assert line.startswith("busy machine: other programs took 1.3 of")
    assert "cores before the first measurement;" in line


def test_a_run_tells_and_stores_how_busy_the_machine_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "others_now", lambda: 0.9)
    measured = Run(tmp_path, CPU, ["ops", "--results", "x"])
    assert "other programs took 0.9 of" in capsys.readouterr().err
    monkeypatch.setattr(Load, "others", lambda self: 1.4)
    measured.finish(Console())
    said = capsys.readouterr()
    assert "other programs took 1.4 of" in said.err and "cores meanwhile" in said.err
    (stored,) = results.read_all(tmp_path)
    assert said.out == f"wrote {stored.path}\n"
    conditions = stored.data["conditions"]
    assert (conditions["others_before"], conditions["others"]) == (0.9, 1.4)
    assert "a busy machine (other programs took 1.4 cores)" in conditions_line(stored)
    conditions["others"] = 0.1
    assert "busy" not in conditions_line(stored)


def test_what_is_impossible_is_no_result():
    assert share_of("ceiling_share", 1.2, MOST_OF_PRODUCTS) == {"ceiling_share": 1.2}
    record = share_of("ceiling_share", 51.48, MOST_OF_PRODUCTS)
    assert record == {"impossible": 51.48}
    assert share_told(record, "ceiling_share") == "impossible"
    assert share_told({"ceiling_share": 0.5}, "ceiling_share") == "50%"
    assert share_told({}, "ceiling_share") == ""
    timed = {"case": "gelu", "mode": "both", "contestant": "fluxfast", "seconds": 1e-6, "gb_s": 9.0}
    shown = io.StringIO()
    Console(file=shown, width=150).print(ops_table([timed | record]))
    assert "impossible" in shown.getvalue() and "5148" not in shown.getvalue()


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    said = io.StringIO()
    for name in in_turn(["a", "b", "c [bold]"], Console(file=said)):
        # the second begins too soon after the first to be worth a line
        clock.now += {"a": 1.0, "b": progress.BETWEEN_LINES}.get(name, 0.0)
    assert said.getvalue() == "1 of 3: a\n3 of 3: c [bold]\n"


def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=80)
    with Steps(1, console) as steps:
        steps.begin("first")
        steps.begin("one that was not foreseen")
    text = said.getvalue()
    assert "one that was not foreseen" in text and "1/2" in text
    # the bar's line is erased at the end
    assert text.rstrip().endswith("\x1b[2K") or "\x1b[2K" in text[-20:]


def test_an_op_that_would_not_run_is_refused(capsys):
    words = ["ops", "--device", "cpu", "--shapes", "tiny"]
    assert main([*words, "--ops", "gelu,lora_linear_qkv_int8"]) == 1
    assert "--ops: lora_linear_qkv_int8: on a GPU alone" in capsys.readouterr().err
    assert main([*words, "--ops", "gelo"]) == 1
    assert "got 'gelo'; did you mean 'gelu'?" in capsys.readouterr().err
    assert main(["opps"]) == 2
    assert "no command 'opps'. Did you mean ops?" in capsys.readouterr().err


def test_outside_a_checkout_results_have_a_folder_of_their_own(tmp_path):
    code = "from fluxfast_bench.report.results import ROOT; print(ROOT)"
    for where, expected in (
        (tmp_path, "fluxfast-bench-results"),
        (tmp_path / "checkout", "bench/results"),
    ):
        (where / "bench").mkdir(parents=True)
        if where.name == "checkout":
            (where / "bench/targets.toml").touch()
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=where, env=os.environ, capture_output=True, check=True
        )
        assert found.stdout.decode().strip() == os.path.normpath(expected)
