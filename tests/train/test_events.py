from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfast.train import events
from fluxfast.train.events import Metrics, Numbers, memory_gib, read_metrics
from fluxfast.train.loss_chart import plot_loss


def test_metrics_are_cut_where_a_resumed_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, print)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    metrics = Metrics(tmp_path / "metrics.jsonl", 3, print)
    metrics.write({"step": 4, "loss": 9.0})
    metrics.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def test_loss_plot_is_drawn(tmp_path):
    plot_loss(
        [{"step": i, "loss": 1 / i, "learning_rate": 1e-4} for i in range(1, 120)],
        tmp_path / "loss.png",
    )
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_regularisation_has_a_line_of_its_own_in_the_plot(tmp_path):
    lines = [{"step": i, "loss": 1 / i, "learning_rate": 1e-4} for i in range(1, 60)]
    plot_loss(lines, tmp_path / "without.png")
    for line in lines[::3]:
        line["regularisation_loss"] = line["loss"] = 0.01
    for name, drawn in (("with.png", lines), ("alone.png", lines[::3])):
        plot_loss(drawn, tmp_path / name)

    def green(name):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        return int(((green - red > 60) & (green - blue > 60)).sum())

    # matplotlib's green, which nothing else is drawn in
    assert green("without.png") == 0 < green("with.png")
    assert green("alone.png") == 0


GOOD = [
    '{"step": 1, "loss": 0.5}',
    '{"step": 2, "loss": 0.25, "learning_rate": null}',
    '{"step": 3, "loss": 1}',
]


@pytest.mark.parametrize(
    "bad",
    [
        b"{", b"\xff\xfe\x00\x80", b"null", b"[1, 2]", b"7", b'"step"', b"", b"{}", b'{"step": 4}',
        b'{"loss": 1}', b'{"step": "4", "loss": 1}', b'{"step": true, "loss": 1}',
        b'{"step": -1, "loss": 1}', b'{"step": 4, "loss": NaN}', b'{"step": 4, "loss": Infinity}',
        b'{"step": 4, "loss": "x"}', b'{"step": 4, "loss": null}', b"[" * 100_000,
        b'{"step": 4, "loss": 1' + b"0" * 400 + b"}", b'{"step": 4, "loss": 1' + b"0" * 5000 + b"}",
        b'{"step": 2.5, "loss": 1}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_left_out_and_counted(tmp_path, bad):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_bytes(
        b"\n".join([GOOD[0].encode(), bad, *(line.encode() for line in GOOD[1:]), bad]) + b"\n"
    )
    lines = read_metrics(path, said.append)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert said == [f"{path}: 2 of 5 lines can't be read, and are left out"]
    plot_loss(lines, tmp_path / "loss.png")
    metrics = Metrics(tmp_path / "metrics.jsonl", 2, said.append)
    metrics.write({"step": 3, "loss": 9.0})
    metrics.close()
    assert [line["loss"] for line in read_metrics(path)] == [0.5, 0.25, 9.0]
    assert len(said) == 2


def test_metrics_that_can_not_be_written_end_nothing(tmp_path):
    said = []
    (tmp_path / "metrics.jsonl").mkdir()
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, said.append)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    assert len(said) == 1 and "metrics.jsonl" in said[0] and "the run goes on without" in said[0]

    (tmp_path / "metrics.jsonl").rmdir()
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, said.append)
    # a disk that is full by now
    metrics._file = Path("/dev/full").open("w")  # noqa: SIM115
    for step in (1, 2):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    assert len(said) == 2 and "No space left" in said[1]


def test_numbers_that_fail_are_told_once():
    said = []
    numbers = Numbers(said.append)
    for _ in range(3):
        with numbers.guard("tensorboard"):
            raise RuntimeError("gone")
    with numbers.guard("loss.png"):
        pass
    assert said == ["tensorboard: gone; the run goes on without"]
    with pytest.raises(KeyboardInterrupt), numbers.guard("tensorboard"):
        raise KeyboardInterrupt


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path):
    assert memory_gib(torch.device("cpu")) > 0
    (tmp_path / "status").write_text("Name:\tpython\n")
    for name in ("status", "absent"):
        monkeypatch.setattr(events, "PROCESS_STATUS", tmp_path / name)
        assert memory_gib(torch.device("cpu")) is None
