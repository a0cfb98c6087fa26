"""What the training loop shows: whole where it matters at any width, and plain lines in a log."""

import contextlib
import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from fluxfast.train.training_bar import TrainingBar, fitted

LINE = {
    "loss": 0.42314, "learning_rate": 1e-4, "steps_per_second": 3.2, "memory_gib": 12.34,
}  # fmt: skip


def shown(width, total=1000, step=120, line=LINE):
    """The last line of a terminal of this width."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, force_interactive=True)
    with TrainingBar(console, total, 0) as bar:
        bar.tick()
        bar.show(step, line)
    text = Text.from_ansi(out.getvalue().replace("\r", "\n")).plain
    return [line for line in text.splitlines() if "/" in line][-1].rstrip()


@pytest.mark.parametrize("total", [12, 1000, 100_000])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(width, total):
    line = shown(width, total, total // 2)
    assert len(line) <= width
    assert "…" not in line and ("━" in line or width < 80)
    assert f"{total // 2}/{total}" in line
    assert re.search(r"\d:\d\d:\d\d · \d+:\d\d:\d\d left", line)
    assert "loss 0.4231" in line
    assert ("lr 1.00e-04" in line) == ("GiB" in line and width >= 120)


def test_learning_rate_goes_first_then_memory_then_the_rate():
    left = [
        [word for word in ("lr", "GiB", "steps/s") if word in shown(w)] for w in range(110, 55, -1)
    ]
    kept = [tuple(words) for words in left]
    assert list(dict.fromkeys(kept)) == [
        ("lr", "GiB", "steps/s"), ("GiB", "steps/s"), ("steps/s",), (),
    ]  # fmt: skip


def test_parts_that_stay_do_so_at_any_width():
    assert fitted("a", ["b", "c", "d"], 1, kept=2) == "a · b · c"
    assert fitted("a", ["b", "c", "d"], 13, kept=2) == "a · b · c · d"


def logged(total, done, steps, monkeypatch, seconds=0.0):
    """The lines of a log of these steps, each of which takes so many seconds."""
    now = [1000.0]
    monkeypatch.setattr("fluxfast.train.training_bar.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with TrainingBar(Console(file=out, width=80), total, done) as bar:
        for step in steps:
            now[0] += seconds
            bar.tick()
            bar.show(step, LINE | {"loss": float(step)})
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert all(line.startswith("step ") for line in lines)
    return [int(re.match(r"step (\d+)/", line)[1]) for line in lines], lines


def test_a_log_has_a_line_every_few_steps(monkeypatch):
    steps, lines = logged(1000, 0, range(1, 1001), monkeypatch)
    assert steps == [1, *range(50, 1001, 50)]
    assert all(word in lines[1] for word in ("loss 50.0000", "lr 1.00e-04", "12.3 GiB", "left"))
    assert logged(7, 0, range(1, 8), monkeypatch)[0] == list(range(1, 8))
    assert logged(503, 400, range(401, 504), monkeypatch)[0] == [401, *range(410, 504, 10), 503]


def test_slow_steps_have_a_line_each_half_minute(monkeypatch):
    steps, _ = logged(10_000, 0, range(1, 21), monkeypatch, seconds=12.0)
    assert steps == [1, 4, 7, 10, 13, 16, 19]


def test_no_bar_stands_above_an_error():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, force_interactive=True)
    with contextlib.suppress(OSError), TrainingBar(console, 10, 0) as bar:
        bar.show(1, LINE)
        raise OSError
    assert "\x1b[1A\x1b[2K" in out.getvalue()[-20:]
