"""What a whole run prints: within the terminal's width, readable on black and on white, and plain
in a log.
"""

import io
import re

import pytest
from drawing_cases import DRAWS
from rich.console import Console
from rich.text import Text

from fluxfast.config.run import load_config
from fluxfast.train.trainer import train

# ANSI's yellow, cyan, white and their bright forms can't be read on white, black and dim not on
# black
UNREADABLE = re.compile(r"\x1b\[(?:\d+;)*(?:2|30|33|36|37|93|96|97)(?:;\d+)*m")


def printed(write_config, monkeypatch, tmp_path, **how):
    # short paths, as a user's are: a path is never broken, however long
    monkeypatch.chdir(tmp_path)
    config = load_config(write_config(**DRAWS))
    config = config.model_copy(update={"output_dir": config.output_dir.relative_to(tmp_path)})
    out = io.StringIO()
    train(config, Console(file=out, **how))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_fits_its_terminal(write_config, monkeypatch, tmp_path, width):
    shown = printed(
        write_config, monkeypatch, tmp_path, width=width, force_terminal=True,
        force_interactive=True, color_system="standard",
    )  # fmt: skip
    plain = Text.from_ansi(shown.replace("\r", "\n")).plain
    lines = [line.rstrip() for line in plain.splitlines()]
    # a path of the test's own folders has no place to be broken
    assert [line for line in lines if len(line) > width and "/" not in line] == []
    assert not any("…" in line for line in lines)
    assert not UNREADABLE.search(shown)
    assert any(line.startswith("training") and "6/6" in line for line in lines)


def test_a_log_of_a_run_is_plain(write_config, monkeypatch, tmp_path):
    shown = printed(write_config, monkeypatch, tmp_path)
    assert not re.search("[\r\x1b\x08]", shown)
    assert re.search(r"^step 6/6 · \d:\d\d:\d\d · .*loss", shown, re.MULTILINE)
    assert "━━━ " not in shown
