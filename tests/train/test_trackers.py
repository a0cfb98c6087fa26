"""What trackers are sent, read from their files."""

import json
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_file import read_run

from config_helpers import load
from fluxfast.train import trackers
from fluxfast.train.trackers import Trackers, run_id

LINE = {"step": 1, "loss": 0.5, "learning_rate": 1e-3, "epoch": 1, "grad_norm": 2.0,
        "dataset": "photos", "memory_gib": None}  # fmt: skip
SENT = {"train_loss": 0.5, "learning_rate": 1e-3, "epoch": 1, "grad_norm": 2.0}


@pytest.fixture(autouse=True)
def _offline_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def config(tmp_path):
    """A config with secrets and paths in it."""

    def write(report_to="tensorboard,wandb", **keys):
        hook = {"webhook_type": "raw", "callback_url": "http://host/hush", "auth_token": "hush"}
        return load(
            report_to=report_to, output_dir=str(tmp_path / "out"), learning_rate=1e-3,
            webhook_config=hook, validation_prompt=f"a cup of {tmp_path}/beans", **keys,
        )  # fmt: skip

    return write


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, colour in enumerate(["red", "blue"]):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (24, 16), colour).save(paths[-1])
    return paths


def of_tensorboard(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def send(config, lines, images=None, done=0, seed=11):
    said = []
    sent = Trackers(config, seed=seed, done=done, say=said.append)
    for line in lines:
        sent.log(line["step"], line)
    if images:
        sent.log_images(lines[-1]["step"], images)
    sent.close()
    return said


def test_each_tracker_gets_the_metrics_and_images(config, tmp_path, pictures):
    lines = [LINE, LINE | {"step": 2, "loss": 0.25, "loss/val/photos": 0.75}]
    assert not send(config(), lines, {"cup": pictures, "saucer": pictures[1:]})

    board = of_tensorboard(tmp_path / "out" / "logs" / tmp_path.name)
    assert {tag: board.Scalars(tag)[0].value for tag in SENT} == pytest.approx(SENT)
    assert [(e.step, e.value) for e in board.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in board.Scalars("loss/val/photos")] == [(2, 0.75)]
    tags = ["validation/cup/0", "validation/cup/1", "validation/saucer"]
    assert sorted(board.Tags()["images"]) == tags
    (saucer,) = board.Images("validation/saucer")
    assert (saucer.step, saucer.width, saucer.height) == (2, 24, 16)
    assert not set(board.Tags()["scalars"]) & {"step", "dataset", "memory_gib"}

    _, project, _, (first, second, gallery) = read_run(tmp_path)
    assert project == tmp_path.name
    assert {k: v for k, v in first.items() if not k.startswith("_")} == SENT | {"step": 1}
    assert second["step"] == 2 and second["loss/val/photos"] == 0.75
    assert gallery["step"] == 2 and gallery["validation.captions"] == ["cup", "cup", "saucer"]
    assert gallery["validation.count"] == 3
    assert len(list(tmp_path.rglob("media/images/*.png"))) == 2


def test_images_as_a_table(config, tmp_path, pictures):
    send(config("wandb", tracker_image_layout="table"), [LINE], {"cup": pictures[:1]})
    (file,) = tmp_path.rglob("*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["prompt", "image"] and table["data"][0][0] == "cup"


def test_no_secret_and_no_path_is_sent(config, tmp_path, pictures):
    send(config(), [LINE], {"cup": pictures})
    _, _, told, _ = read_run(tmp_path)
    assert told["learning_rate"] == 1e-3 and told["seed"] == 11 and told["model_type"] == "lora"
    board = of_tensorboard(tmp_path / "out" / "logs" / tmp_path.name)
    (text,) = board.Tensors("config/text_summary")
    assert b'"learning_rate": 0.001' in text.tensor_proto.string_val[0]
    (events,) = tmp_path.rglob("events.out.tfevents*")
    (synced,) = tmp_path.rglob("run-*.wandb")
    files = [events, synced, *(path for path in synced.parent.glob("files/**/*") if path.is_file())]
    assert len(files) > 3
    for path in files:
        data = path.read_bytes()
        assert b"hush" not in data and str(tmp_path).encode() not in data, path
        # shorter names of a machine may stand in any bytes
        name = socket.gethostname().encode()
        assert len(name) < 5 or name not in data, path


def test_a_resumed_run_goes_on_and_its_repeated_steps_count_once(config, tmp_path):
    send(config(max_train_steps=4), [LINE | {"step": step} for step in (1, 2, 3)])
    first = read_run(tmp_path)[0]
    for path in tmp_path.rglob("run-*.wandb"):
        path.unlink()
    again = [LINE | {"step": step, "loss": 9.0} for step in (3, 4)]
    assert not send(config(max_train_steps=6), again, done=2)
    assert read_run(tmp_path)[0] == first
    assert [line["step"] for line in read_run(tmp_path)[3]] == [3, 4]
    board = of_tensorboard(tmp_path / "out" / "logs" / tmp_path.name)
    losses = [(event.step, event.value) for event in board.Scalars("train_loss")]
    assert losses == [(1, 0.5), (2, 0.5), (3, 9.0), (4, 9.0)]


def test_the_id_is_the_runs_own(config):
    own = run_id(config(), 11)
    assert own == run_id(config(num_train_epochs=3, validation_seed=5), 11)
    others = [
        run_id(config(lora_rank=3), 11), run_id(config(), 12),
        run_id(config(tracker_run_name="other"), 11),
        run_id(config().model_copy(update={"output_dir": Path("other")}), 11),
    ]  # fmt: skip
    assert len({own, *others}) == 5 and len(own) == 16


class Broken:
    """A tracker whose calls fail from some point on."""

    def __init__(self, works_until):
        self.left = works_until

    def log(self, *args):
        self.left -= 1
        if self.left < 0:
            raise OSError("the tracker is gone")

    log_images = close = log


@pytest.mark.parametrize("works_until", [0, 1])
def test_a_tracker_that_fails_is_told_once_and_stops_no_other(
    config, tmp_path, pictures, monkeypatch, works_until
):
    kinds = {**trackers._KINDS, "wandb": lambda *args: Broken(works_until)}
    monkeypatch.setattr(trackers, "_KINDS", kinds)
    said = send(config("wandb,tensorboard"), [LINE, LINE | {"step": 2}], {"cup": pictures})
    assert said == ["wandb: the tracker is gone; the run goes on without"]
    board = of_tensorboard(tmp_path / "out" / "logs" / tmp_path.name)
    assert len(board.Scalars("train_loss")) == 2 and len(board.Tags()["images"]) == 2


def test_a_tracker_that_does_not_start_is_told_once(config, monkeypatch):
    def fail(*args):
        raise RuntimeError("no account")

    monkeypatch.setattr(trackers, "_KINDS", {"wandb": fail, "tensorboard": lambda *a: Broken(9)})
    assert send(config(), [LINE, LINE]) == ["wandb: no account; the run goes on without"]


def test_an_image_that_cannot_be_read_is_told(config, tmp_path):
    said = send(config("tensorboard"), [LINE], {"cup": [tmp_path / "gone.png"]})
    assert len(said) == 1 and said[0].startswith("images for trackers: ")


def test_what_is_in_use_is_told_of_all_and_nothing_happens_without_any(config, tmp_path):
    assert send(config("all"), [LINE]) == ["report_to all: tensorboard, wandb"]
    assert not send(config("none"), [LINE], {"cup": [tmp_path / "gone.png"]})


def test_numbers_alone_are_sent(config, monkeypatch):
    sent = []

    class Keep:
        def log(self, step, metrics):
            sent.append((step, metrics))

        def close(self):
            pass

    monkeypatch.setattr(trackers, "_KINDS", {"tensorboard": lambda *args: Keep()})
    send(config("tensorboard"), [LINE | {"held": torch.tensor(3.0), "dataset": "photos"}])
    assert sent == [(1, SENT)]
