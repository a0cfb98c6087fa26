import os
import signal

import pytest
from PIL import Image

from fluxfast.train.events import Metrics, StopRequest, plot_loss, read_metrics


def test_metrics_are_cut_where_a_resumed_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path, 0, print)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    metrics = Metrics(tmp_path, 3, print)
    metrics.write({"step": 4, "loss": 9.0})
    metrics.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_first_signal_asks_second_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_loss_plot_is_drawn(tmp_path):
    plot_loss([{"step": i, "loss": 1 / i, "learning_rate": 1e-4} for i in range(1, 120)], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
