"""How commands end that were mistyped, interrupted, or whose output nobody reads."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fluxfast.cli.main import COMMANDS, main

SCRIPT = "import sys; from fluxfast.cli.main import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", SCRIPT]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demmo"], "did you mean demo?"),
        (["paln", "config.json"], "did you mean plan?"),
        (["xyzzy"], "`fluxfast-train -h` lists the commands"),
        (["cache", "--cler"], "did you mean --clear?"),
        (["plan", "config.json", "--gpuu=T4"], "--gpuu; did you mean --gpu?"),
        (["data", "config.json", "--ot", "sheets"], "--ot; did you mean --out?"),
        (["doctor", "--al"], "--al; did you mean --all?"),
        (["demo", "--outptu", "x"], "--outptu; did you mean --output?"),
        (["demo", "--learning-rte=1"], 'did you mean "learning_rate"?'),
        (["merge", "a", "b", "c", "--strenght=2"], "did you mean --strength?"),
    ],
)
def test_a_mistyped_word_is_met_with_the_nearest(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    # argparse ends the process itself
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_a_config_may_be_named_as_a_command_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.json").write_text("{}")
    assert main(["cats"]) == 2
    assert "cats.json" in capsys.readouterr().err
    assert main(["train", "cat"]) == 2
    assert "did you mean cats.json?" in capsys.readouterr().err
    assert main(["cat.json"]) == 2
    assert "did you mean cats.json?" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
@pytest.mark.parametrize("words", [["-h"], *([name, "--help"] for name in COMMANDS), ["keys"]])
def test_a_closed_pipe_ends_without_a_traceback(words, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, *words], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    os.close(write)
    # argparse takes a closed pipe for a read one
    assert done.returncode in (0, 141) and done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("module", ["torch", "fluxfast.cli.doctor", "rich"])
@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_while_modules_are_imported(module, swallows, tmp_path):
    # says when the import begins that is to be interrupted; a package may catch what is raised
    wait = "time.sleep(60)"
    if swallows:
        wait = f"\n            try: {wait}\n            except KeyboardInterrupt: pass"
    watched = (
        "import signal, sys, time\n"
        # a shell's background ignores Ctrl-C, and so would what is started there
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}:\n"
        f"            print('now', flush=True); {wait}\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", watched + SCRIPT, "doctor"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline() == "now\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted\n")
