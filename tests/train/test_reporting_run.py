"""Whole runs that tell webhooks and trackers of themselves."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_previews import tiny_autoencoder
from test_trainer import FP32
from wandb_file import read_run
from webhook_server import SECRET, answers, hangs_up

from fluxfast.train.events import read_metrics
from fluxfast.train.run_events import read_events

IMAGES = {
    "validation_disable": False, "validation_prompt": "a red cup", "validation_resolution": "64",
    "validation_num_inference_steps": 2, "validation_guidance": 3.0,
}  # fmt: skip


def hook(server, **keys):
    return {"webhook_type": "raw", "callback_url": server.url, **keys}


def test_a_webhook_gets_what_events_jsonl_has(run, server, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    run(
        max_train_steps=3, webhook_config=hook(server), webhook_reporting_interval=2,
        validation_preview=True, validation_preview_model=str(tmp_path / "tiny"), **IMAGES, **FP32,
    )  # fmt: skip
    posted = [json.loads(body) for _, body in server.posts]
    images = [event.pop("images") for event in posted]
    for event in posted:
        event.pop("message")
    events = read_events(tmp_path / "output" / "events.jsonl")
    steps = [e for e in events if e["type"] == "training.status" and "progress" in e]
    assert [event["progress"]["current"] for event in steps] == [1, 2, 3]
    odd = [event for event in steps if event["progress"]["current"] % 2]
    assert posted == [event for event in events if event not in odd]
    shown = [event for event, pictures in zip(posted, images, strict=True) if pictures]
    assert [event["type"] for event in shown] == ["validation.image"] * 6
    kinds = [(e["data"]["validation_type"], e["data"]["prompt"]) for e in shown]
    assert kinds == [*[("intermediary", "a red cup")] * 2, ("final", "a red cup")] * 2
    assert "Validation of step 3: validation" in [event["title"] for event in shown]
    assert posted[-1]["data"] == {"status": "completed"}
    assert (tmp_path / "output" / "validation_images" / "preview_validation.png").exists()


@pytest.mark.parametrize("kind", ["500", "hangs up", "killed midway", "dead"])
def test_a_run_ends_alike_whatever_its_webhook_does(run, server, tmp_path, monkeypatch, kind):
    lora, out = run(max_train_steps=3, **FP32)
    whole = lora.read_bytes()
    server.answer = {"500": answers(500), "hangs up": hangs_up}.get(kind, server.answer)
    if kind == "dead":
        server.stop()
    if kind == "killed midway":
        kill_at_a_checkpoint(server)
    hooked, out = run(
        name="hooked", max_train_steps=3, webhook_config=hook(server, auth_token=SECRET), **FP32
    )
    assert hooked.read_bytes() == whole
    told = [line for line in out.getvalue().splitlines() if "webhook" in line]
    assert len(told) == 1 and "later events are sent all the same" in told[0]
    for path in (tmp_path / "hooked").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in out.getvalue()


def kill_at_a_checkpoint(server):
    """Have a server close its port once it hears of a checkpoint, and never answer that."""

    def answer(handler):
        _, body = server.posts[-1]
        if json.loads(body)["type"] == "training.checkpoint":
            server.stop()
            hangs_up(handler)
        else:
            answers(204)(handler)

    server.answer = answer


def test_a_failure_is_told_before_the_run_ends(run, server, monkeypatch):
    from fluxfast.train.trainer import Trainer

    monkeypatch.setattr(Trainer, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(max_train_steps=3, webhook_config=hook(server, log_level="error"), **FP32)
    (event,) = [json.loads(body) for _, body in server.posts]
    assert event["type"] == "error" and "ZeroDivisionError" in event["traceback"]


def test_trackers_of_a_resumed_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"report_to": "tensorboard,wandb", **IMAGES, **FP32}
    run(max_train_steps=2, **settings)
    first = read_run(tmp_path)
    for path in tmp_path.rglob("run-*.wandb"):
        path.unlink()
    run(max_train_steps=4, **settings)
    second = read_run(tmp_path)
    assert first[0] == second[0]
    lines = [line for line in first[3] + second[3] if "train_loss" in line]
    metrics = read_metrics(tmp_path / "output" / "metrics.jsonl")
    names = ("step", "learning_rate", "grad_norm", "epoch")
    assert [{n: line[n] for n in names} for line in lines] == [
        {n: line[n] for n in names} for line in metrics
    ]
    assert [line["train_loss"] for line in lines] == [line["loss"] for line in metrics]
    galleries = [line for line in first[3] + second[3] if "validation.captions" in line]
    assert [line["step"] for line in galleries] == [0, 2, 4]
    board = EventAccumulator(str(tmp_path / "output" / "logs" / tmp_path.name)).Reload()
    assert [event.step for event in board.Scalars("train_loss")] == [1, 2, 3, 4]
    assert [event.step for event in board.Images("validation/validation")] == [0, 2, 4]
