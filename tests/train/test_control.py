"""How a run is asked for something, and that only one works in a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from drawing_cases import DRAWS_TRAINED
from kill_cases import kill_at, same_files

from fluxfast.train import run_lock
from fluxfast.train.control import (
    SAVE,
    STOP,
    STOPPED_EXIT,
    VALIDATE,
    Interrupted,
    Requests,
    Stopped,
    request_file,
)
from fluxfast.train.run_events import read_events
from fluxfast.train.run_lock import LOCK_NAME, FolderInUse, RunLock, holder


def test_signals_and_files_ask_for_the_same(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Requests(tmp_path) as requests:
        assert [requests.asked(each) for each in (SAVE, VALIDATE, STOP)] == [None, None, None]
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert [requests.asked(each) for each in (SAVE, VALIDATE)] == ["SIGUSR1", "SIGUSR2"]
        requests.done(SAVE)
        assert requests.asked(SAVE) is None and requests.asked(VALIDATE) == "SIGUSR2"
        for wanted in (SAVE, STOP):
            request_file(tmp_path, wanted).touch()
            assert requests.asked(wanted) == f"request.{wanted}"
            requests.done(wanted)
            assert requests.asked(wanted) is None and not request_file(tmp_path, wanted).exists()
        request_file(tmp_path, VALIDATE).touch()
        requests.forget_old()
        assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_signal_asks_and_the_second_interrupts(tmp_path):
    with Requests(tmp_path) as requests:
        with requests.after_steps():
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.asked(STOP) == "SIGTERM"
            with pytest.raises(Interrupted) as interrupted:
                os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.value.signal == signal.SIGINT
    with Requests(tmp_path), pytest.raises(KeyboardInterrupt):
        # nothing to save yet
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_answered_at_once_from_another_thread(tmp_path):
    """While the main thread is in a call that does not return, too."""
    heard, said = threading.Event(), []

    def say(text):
        said.append((text, threading.current_thread().name))
        heard.set()

    with Requests(tmp_path, say) as requests, requests.after_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(60)
        heard.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.wait(60)
    told = "SIGTERM: finishing this step, then saving; Ctrl-C again to leave now"
    assert said == [
        (told, "signals"),
        ("SIGUSR1: finishing this step, then saving a checkpoint", "signals"),
    ]
    assert "signals" not in [thread.name for thread in threading.enumerate()]
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_takes_no_signals(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    seen = []

    def look():
        with Requests(tmp_path) as requests:
            request_file(tmp_path, SAVE).touch()
            seen.append((signal.getsignal(signal.SIGUSR1), requests.asked(SAVE)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(before, "request.save")]


def test_a_run_saves_and_draws_when_it_is_asked(run, monkeypatch, tmp_path):
    def ask():
        os.kill(os.getpid(), signal.SIGUSR1)
        request_file(tmp_path / "output", VALIDATE).touch()

    kill_at(monkeypatch, 3, ask)
    run(checkpoint_step_interval=0, **DRAWS_TRAINED)
    output = tmp_path / "output"
    assert {p.name for p in output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    drawn = {p.name for p in (output / "validation_images").glob("step_*")}
    assert drawn == {f"step_{step:06d}_validation_0_64x48.png" for step in (3, 6)}
    assert not list(output.glob("request.*")) and not (output / LOCK_NAME).exists()


def test_a_file_stops_a_run_which_goes_on(run, monkeypatch, tmp_path):
    whole, _ = run(name="whole")
    kill_at(monkeypatch, 3, lambda: request_file(tmp_path / "stopped", STOP).touch())
    with pytest.raises(Stopped, match=r"request\.stop.*checkpoint-3"):
        run(name="stopped")
    ended = read_events(tmp_path / "stopped" / "events.jsonl")[-1]
    assert ended["stage"]["key"] == "training_abort" and ended["stage"]["status"] == "completed"
    again, _ = run(name="stopped")
    assert same_files(whole, again)


def command(config, *words):
    code = "import sys; from fluxfast.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(config), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_and_two_runs_in_one_folder(write_config, tmp_path):
    output = tmp_path / "output"
    steps = {"max_train_steps": 100_000, "checkpoint_step_interval": 2}
    first = command(write_config(**steps))
    wait_for(output / "checkpoint-2", first)
    held = json.loads((output / LOCK_NAME).read_text())
    assert held["pid"] == first.pid == holder(output)["pid"]
    second = command(write_config(**steps))
    _, told = second.communicate(timeout=240)
    assert second.returncode == 1
    assert f"process {first.pid} on {socket.gethostname()}" in told and "output_dir" in told
    first.send_signal(signal.SIGTERM)
    _, told = first.communicate(timeout=60)
    assert first.returncode == STOPPED_EXIT and "stopped by SIGTERM" in told
    assert holder(output) is None and not (output / LOCK_NAME).exists()


def test_a_killed_run_holds_nobody_back(tmp_path):
    lock = RunLock(tmp_path, print)
    lock.__enter__()
    path = tmp_path / LOCK_NAME
    held = json.loads(path.read_text())
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        RunLock(tmp_path, print).__enter__()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left in (
        held | {"pid": dead.pid},
        # another process has the number by now
        held | {"process_started": held["process_started"] - 1000},
        held | {"pid": "what"},
    ):
        path.write_text(json.dumps(left))
        assert holder(tmp_path) is None
        with RunLock(tmp_path, print):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()
    lock._ended.set()


def test_a_run_on_another_machine_is_believed_while_it_touches_its_file(tmp_path, monkeypatch):
    path, said = tmp_path / LOCK_NAME, []
    monkeypatch.setattr(run_lock, "SILENT", 0.6)
    for content in (json.dumps({"host": "elsewhere", "pid": 1}), ""):
        path.write_text(content)
        # silent for as long as it takes
        os.utime(path, (time.time() - 100, time.time() - 100))
        with RunLock(tmp_path, said.append):
            pass
        assert not said
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1 and "elsewhere" in said[0] and "waiting" in said[0]

    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    monkeypatch.setattr(run_lock, "SILENT", 60)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(path, (1e9, 1e9)))
    with pytest.raises(FolderInUse, match="elsewhere"):
        RunLock(tmp_path, said.append).__enter__()


def test_a_lock_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(run_lock.os, "link", refuse)
    with (
        RunLock(tmp_path, print),
        pytest.raises(FolderInUse),
        RunLock(tmp_path, print),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH", 0.01)
    touched = threading.Event()
    real = os.utime

    def touch(path):
        real(path)
        touched.set()

    monkeypatch.setattr(run_lock.os, "utime", touch)
    with RunLock(tmp_path, print):
        assert touched.wait(30)
