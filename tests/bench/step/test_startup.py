"""`fluxfast-bench startup`: each way from a checkpoint to a step, and what imports cost."""

import json

import pytest

from fluxfast_bench.main import main
from fluxfast_bench.report import results
from fluxfast_bench.step import imports, startup


def test_startup_measures_each_way_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    steps = {"load_seconds": 2.0, "seconds": 3.0, "load_rss_gib": 1.5, "peak_rss_gib": 4.0}
    asked = []

    def started(way, path, format, device, limit):
        asked.append((way, path.name, format))
        return (
            {"reason": "its process died with exit code 9"} if way == "diffusers" else dict(steps)
        )

    monkeypatch.setattr(startup, "started", started)
    monkeypatch.setattr(startup, "LARGE", 0)
    monkeypatch.setattr(startup, "copy_seconds", lambda files, folder: 1.6)
    assert (
        main(
            [
                "startup",
                "--device",
                "cpu",
                "--formats",
                "int4,nf4",
                "--ways",
                "diffusers,quantise,cached",
                "--results",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert asked == [
        ("diffusers", "checkpoint", ""),
        ("quantise", "checkpoint", "int4"),
        ("cached", "quantised.safetensors", "int4"),
        ("quantise", "checkpoint", "nf4"),
        ("cached", "quantised.safetensors", "nf4"),
    ]
    peer, quantised, cached, *_ = results.read_all(tmp_path)[0].records
    assert peer["reason"].endswith("exit code 9") and cached["seconds"] == 3.0
    assert quantised["times_copy"] == 1.25 and "times_copy" not in cached
    # of what loading took, what is beyond the model itself
    assert quantised["extra_gib"] == pytest.approx(1.5 - quantised["quantised_gib"], abs=1e-3)
    assert "died" in capsys.readouterr().out


def test_a_start_really_ends_with_a_step(tmp_path, capsys):
    assert (
        main(["startup", "--device", "cpu", "--ways", "quantise", "--results", str(tmp_path)]) == 0
    )
    (line,) = results.read_all(tmp_path)[0].records
    assert (
        0 < line["load_seconds"] < line["seconds"]
        and 0 <= line["load_rss_gib"] < line["peak_rss_gib"]
    )
    assert "extra_gib" not in line
    assert json.loads(results.read_all(tmp_path)[0].path.read_text())["kind"] == "startup"
    capsys.readouterr()


def test_imports_are_a_way_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        imports, "IMPORTS", {"the trainer": "import fluxfast", "json": "import json"}
    )
    monkeypatch.setattr(imports, "RUNS", 1)
    monkeypatch.setattr(startup, "measure", lambda *_: pytest.fail("no checkpoint was asked for"))
    assert main(["startup", "--ways", "imports", "--results", str(tmp_path)]) == 0
    ours, theirs = results.read_all(tmp_path)[0].records
    assert ours["ours"] and not theirs["ours"]
    assert 0 <= ours["import_seconds"] < 5 and ours["case"] == "imports"
    assert "the trainer" in capsys.readouterr().out


def test_an_import_that_fails_is_named():
    with pytest.raises(ValueError, match=r"imports failed: .*no_such_module"):
        imports.seconds_of("import no_such_module", "")
