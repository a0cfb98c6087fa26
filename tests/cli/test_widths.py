"""What commands print fits a terminal of 80 columns."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from fluxfast.cli.main import COMMANDS, main
from fluxfast.text import command_list
from fluxfast_bench.main import COMMANDS as BENCH_COMMANDS

HELP = [
    *(("fluxfast.cli.main", command) for command in ("", *COMMANDS)),
    *(("fluxfast_bench.main", command) for command in ("", *BENCH_COMMANDS)),
]


def printed(capsys, module, words):
    try:
        status = importlib.import_module(module).main(words)
    # argparse's own way to end after its help
    except SystemExit as ended:
        status = ended.code
    assert status in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize(("module", "command"), HELP, ids=lambda each: each or "none")
def test_help_fits_80_columns(module, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, module, [*([command] if command else []), "--help"])
    assert len(text.splitlines()) > 2
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_errors_end_their_lines_between_words(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"lora_rnk": 4, "learning_rat": 1, "model_type": "x"}')
    assert main(["config.json"]) == 2
    piped = capsys.readouterr().err
    assert max(map(len, piped.splitlines())) > 80
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["config.json"]) == 2
    shown = capsys.readouterr().err
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == piped.split()


def test_every_command_is_listed_in_two_lines_at_most():
    listed = command_list({name: text for name, (_, text) in COMMANDS.items()})
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert len(listed.splitlines()) == len(COMMANDS)
    assert command_list({"a": "one two", "long-name": "three"}, 20).splitlines() == [
        "  a          one two", "  long-name  three",
    ]  # fmt: skip


def test_no_command_needs_colours(tmp_path):
    """With NO_COLOR nothing is coloured, on a terminal too."""
    words = ["plan", "--gpu", "list"]
    environment = os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", f"from fluxfast.cli.main import main; main({words})"],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "RTX 4090" in done.stdout
    assert not re.search(r"\x1b\[(3[0-7]|38|9[0-7])", done.stdout)
