"""Every command that writes says where."""

import importlib
import json
import re

import pytest

from fluxfast_bench.main import COMMANDS, main
from fluxfast_bench.report import results

# what writes nothing but what it prints
PRINT_ONLY = {"check", "formats"}


def written(capsys):
    said = capsys.readouterr().out.replace("\n", "")
    return re.findall(r"wrote (.*?\.(?:json|md|toml))", said)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in PRINT_ONLY])
def test_each_command_has_an_option_for_the_place(name, capsys):
    module = importlib.import_module(f"fluxfast_bench.{COMMANDS[name][0]}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert re.search(r"--results|--out\b|--readme|\bDST\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words",
    [
        ["counts", "--shapes", "tiny"],
        ["predict", "--gpus", "RTX 4090", "--shapes", "512px-b1", "--formats", "int8"],
        ["aot", "--ops", "gelu", "--targets", "sm_90", "--sample", "1", "--jobs", "1"],
    ],
)
def test_what_is_counted(words, tmp_path, capsys):
    path = tmp_path / "new folder" / "found.json"
    main([*words, "--out", str(path)])
    assert written(capsys) == [str(path)]
    assert json.loads(path.read_text())


def test_what_is_measured(tmp_path, capsys):
    words = ["ceilings", "--device", "cpu", "--shapes", "tiny", "--seconds", "0.001"]
    assert main([*words, "--results", str(tmp_path)]) == 0
    (stored,) = results.read_all(tmp_path)
    assert written(capsys) == [str(stored.path)]


def test_pages(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--summary", str(tmp_path / "x.md")]) == 0
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:commands -->\nold\n<!-- /bench -->\n")
    words = ["report", "--results", str(tmp_path), "--readme", str(page)]
    assert main(words) == 0
    assert written(capsys) == [str(tmp_path / "x.md"), str(page)]
    assert main(words) == 0
    assert capsys.readouterr().out == "every table is what the results say\n"
