"""Commands from a process that has imported everything, and tests in forked processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fluxfast_bench import warm
from fluxfast_bench.main import main
from fluxfast_bench.report import gpu_sections, results

RUN = [sys.executable, "-m", "fluxfast_bench.warm", "run"]
# of a command that a test asks for
COMMAND = """
import os, sys, time
FROM = os.getpid()
def main(words):
    print("here", os.getpid() == FROM, os.getcwd(), os.environ["TOLD"], *words)
    print("and there", file=sys.stderr)
    if words == ["raise"]:
        raise ValueError("went wrong")
    if words[0] == "hang":
        open(words[1], "w").write(str(os.getpid()))
        time.sleep(300)
    return int(words[0])
"""


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A socket where the module `asked_for` is served."""
    (tmp_path / "asked_for.py").write_text(COMMAND)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("TOLD", "by the environment")
    serve = f"""
from fluxfast_bench import warm
from pathlib import Path
warm.MODULES = ("asked_for",)
warm.serve(Path({str(tmp_path / "socket")!r}))
"""
    server = subprocess.Popen([sys.executable, "-c", serve], cwd=tmp_path)
    yield tmp_path / "socket"
    server.kill()
    server.wait()


def run(served, *words, **options):
    return subprocess.run(
        [*RUN, served, "asked_for", *words],
        capture_output=True, text=True, check=False, timeout=60, **options,
    )  # fmt: skip


def test_a_command_is_a_fork_that_has_what_its_caller_has(served, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    done = run(served, "3", "words", cwd=folder)
    # it is not the process that imported the module
    assert done.stdout == f"here False {folder} by the environment 3 words\n"
    assert done.stderr == "and there\n" and done.returncode == 3
    failed = run(served, "raise")
    assert failed.returncode == 1 and "ValueError: went wrong" in failed.stderr
    assert run(served, "0").returncode == 0


def test_it_ends_with_who_asked(served, tmp_path):
    asking = subprocess.Popen([*RUN, served, "asked_for", "hang", str(tmp_path / "pid")])
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    asking.send_signal(signal.SIGTERM)
    asking.wait()
    pid = int((tmp_path / "pid").read_text())
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("left", ["socket.unusable", "socket"])
def test_a_command_starts_by_itself_where_nobody_serves(left, tmp_path, monkeypatch):
    (tmp_path / "asked_for.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TOLD", "here")
    if left == "socket":
        # whose server has died
        import socket

        socket.socket(socket.AF_UNIX).bind(str(tmp_path / left))
    else:
        (tmp_path / left).touch()
    done = run(tmp_path / "socket", "4")
    assert done.stdout.startswith("here True") and done.returncode == 4
    assert "asked_for starts by itself" in done.stderr


def test_forks_can_use_a_gpu_where_there_is_none():
    assert warm._forks_have_gpu()


def test_each_outcome_of_tests_is_stored(tmp_path, capfd):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(7))\n"
        "def test_it(i):\n    assert i != 3, 'three is wrong'\n"
        "def test_left_out():\n    pytest.skip('not here')\n"
    )
    words = [str(tmp_path / "test_some.py"), "--rootdir", str(tmp_path), "--jobs", "3"]
    assert main(["tests", *words, "--results", str(tmp_path / "results")]) == 1
    out = capfd.readouterr().out
    assert "of 8 tests: 1 failed, 6 passed, 1 skipped" in out and "three is wrong" in out
    (stored,) = results.read_all(tmp_path / "results")
    assert len(stored.records) == 8
    (failed,) = [r for r in stored.records if "reason" in r]
    assert failed["contestant"].endswith("test_it[3]") and "three is wrong" in failed["reason"]
    page = gpu_sections.tests_section([stored])
    assert "Tests: 1 failed, 6 passed, 1 skipped." in page and "test_it[3]`" in page
    words[-1] = "0"
    assert main(["tests", *words]) == 1
    assert "--jobs: expected 1 or more, got 0" in capfd.readouterr().err
