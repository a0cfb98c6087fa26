"""The events of a run, as other programs read them."""

import json
from datetime import datetime

import pytest
from drawing_cases import DRAWS
from kill_cases import kill_at

from fluxfast.train.control import STOP, Stopped, request_file
from fluxfast.train.reporting import NonFiniteLoss
from fluxfast.train.run_events import STAGES, RunEvents, read_events


def events_of(folder):
    return read_events(folder / "events.jsonl")


def stages(events):
    return [
        (e["stage"]["key"], e["stage"]["status"]) for e in events if e["type"] == "lifecycle.stage"
    ]


def test_a_whole_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPLETUNER_JOB_ID", "job-7")
    run(**DRAWS, max_train_steps=3)
    events = events_of(tmp_path / "output")
    assert {e["job_id"] for e in events} == {"job-7"}
    times = [datetime.fromisoformat(e["timestamp"]) for e in events]
    assert times == sorted(times) and all(time.utcoffset().total_seconds() == 0 for time in times)
    assert {e["severity"] for e in events} == {"info"}

    def both(key):
        return [(key, "running"), (key, "completed")]

    assert stages(events) == [
        ("init_data_backend", "running"), *both("init_vae_cache"),
        ("init_data_backend", "completed"),
        *both("init_load_base_model"), *both("init_prepare_models"), *both("benchmark_base_model"),
        *both("checkpoint_save"), *both("checkpoint_save"), *both("final_validation"),
        *both("model_save"), ("training_complete", "completed"),
    ]  # fmt: skip
    steps = [e["progress"] for e in events if e["type"] == "training.status" and "progress" in e]
    assert [(p["current"], p["total"]) for p in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[-1]["percent"] == 100 and steps[-1]["eta_seconds"] == 0
    assert {"loss", "learning_rate", "epoch", "grad_norm"} <= steps[0]["metrics"].keys()
    saved = [e["checkpoint"] for e in events if e["type"] == "training.checkpoint"]
    assert [(c["label"], c["is_final"]) for c in saved] == [
        ("checkpoint-2", False), ("checkpoint-3", True),
    ]  # fmt: skip
    drawn = [e for e in events if e["type"] == "training.validation"]
    assert [e["files"] for e in drawn] == [
        ["step_000000_validation_base_0_64x48.png"], ["step_000003_validation_0_64x48.png"],
    ]  # fmt: skip
    assert not any("images" in e for e in events)


def test_a_stopped_run_and_its_end(run, monkeypatch, tmp_path):
    kill_at(monkeypatch, 3, lambda: request_file(tmp_path / "output", STOP).touch())
    with pytest.raises(Stopped):
        run()
    first = events_of(tmp_path / "output")
    assert stages(first)[-1] == ("training_abort", "completed")
    run()
    second = events_of(tmp_path / "output")[len(first) :]
    assert ("init_resume_checkpoint", "completed") in stages(second)
    assert stages(second)[-1] == ("training_complete", "completed")
    # another start is another job
    assert first[0]["job_id"] != second[0]["job_id"]


def test_a_failed_run(run, monkeypatch, tmp_path):
    def fail():
        raise NonFiniteLoss("step 2: the loss is nan")

    kill_at(monkeypatch, 2, fail)
    with pytest.raises(NonFiniteLoss):
        run()
    (error,) = [e for e in events_of(tmp_path / "output") if e["type"] == "error"]
    assert error["severity"] == "error" and error["message"] == "step 2: the loss is nan"
    assert "NonFiniteLoss" in error["traceback"]


def test_a_stage_that_fails_is_announced(tmp_path):
    seen = []
    with RunEvents(tmp_path, print) as events:
        events.subscribe(seen.append)
        with pytest.raises(OSError, match="gone"), events.stage("model_save"):
            raise OSError("gone")
    assert stages(events_of(tmp_path)) == [("model_save", "running"), ("model_save", "failed")]
    assert [event.text for event in seen] == [
        STAGES["model_save"], f"{STAGES['model_save']}: failed",
    ]  # fmt: skip


def test_a_listener_or_a_disk_that_fails_is_told_once(tmp_path):
    said = []

    def fail(event):
        raise ConnectionError("no listener")

    seen = []
    (tmp_path / "events.jsonl").mkdir()
    with RunEvents(tmp_path, said.append) as events:
        events.subscribe(fail)
        events.subscribe(seen.append)
        for _ in range(3):
            events.emit("training.status", step=1)
    assert len(seen) == 3 and len(said) == 2
    assert "events.jsonl" in said[0] and "no listener" in said[1]


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    good = json.dumps({"type": "training.status"})
    path.write_bytes(b"\xff\x00\n" + good.encode() + b'\n[1]\n{"no": 1}\n{"type": "err')
    assert read_events(path) == [{"type": "training.status"}]
