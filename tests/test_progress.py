"""Bars on a terminal, plain lines elsewhere."""

import contextlib
import io

import pytest
from rich.console import Console

from fluxfast.progress import BETWEEN_LINES, clock_time, counting, weighing


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


def plain(make):
    """Bars of a log, what they print, and their clock."""
    out, clock = io.StringIO(), Clock()
    bars = make(Console(file=out, width=80))
    bars.get_time = clock
    return bars, out, clock


def test_a_log_has_a_line_each_half_minute_and_at_the_end():
    bars, out, clock = plain(counting)
    with bars:
        task = bars.add_task("encoding cats", total=2000)
        for step in range(1, 2001):
            clock.now = step * 0.05
            bars.advance(task)
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue() and "━" not in out.getvalue()
    assert [line.split(", ")[0] for line in lines] == [
        "encoding cats: 600 of 2,000", "encoding cats: 1,200 of 2,000",
        "encoding cats: 1,800 of 2,000", "encoding cats: 2,000 of 2,000",
    ]  # fmt: skip
    assert lines[0].endswith("0:00:30, 0:01:10 left")
    assert lines[-1].endswith(", 0:01:40")


def test_what_ends_soon_has_no_line():
    bars, out, clock = plain(counting)
    with bars:
        task = bars.add_task("scanning", total=3)
        for _ in range(3):
            clock.now += 1
            bars.update(task, advance=1)
    assert out.getvalue() == ""


def test_bytes_are_told_as_such():
    bars, out, clock = plain(weighing)
    with bars:
        task = bars.add_task("quantising", total=24e9)
        clock.now = BETWEEN_LINES
        bars.advance(task, 6e9)
    assert out.getvalue().startswith("quantising: 6.0 GB of 24.0 GB, 0:00:30")


def test_a_terminal_has_a_bar_and_no_line():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, force_interactive=True)
    with counting(console) as bars:
        bars.get_time = clock = Clock()
        task = bars.add_task("scanning \\[x]", total=10)
        clock.now = 100.0
        bars.update(task, completed=10)
    shown = out.getvalue()
    assert "━" in shown and "scanning [x]" in shown and "10/10" in shown
    assert "0:01:40" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (90061, "1 day, 1:01:01"),
     (200000, "2 days, 7:33:20")],
)  # fmt: skip
def test_durations(seconds, text):
    assert clock_time(seconds) == text


@pytest.mark.parametrize("fails", [False, True])
def test_no_bar_stands_above_an_error(fails):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, force_interactive=True)
    with contextlib.suppress(ValueError), counting(console) as bars:
        bars.add_task("scanning", total=10)
        if fails:
            raise ValueError
    # the end of the output takes the line away, or leaves it
    assert ("\x1b[1A\x1b[2K" in out.getvalue()[-20:]) == fails
