"""`fluxfast-bench quality`, with a training that is made up."""

import json
from pathlib import Path

import pytest
from quality_cases import FP32

from fluxfast.train.control import Stopped
from fluxfast_bench.main import main
from fluxfast_bench.quality import plot, task
from fluxfast_bench.quality.modes import MODES, Mode
from fluxfast_bench.quality.task import Outcome, Scores

ROOT = Path(__file__).resolve().parents[3]
TARGETS = str(ROOT / "bench" / "targets.toml")
WORDS = ["fp32", "int8 base", "recompute full"]


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


class Trainings:
    """Takes the trainer's place: the runs that were asked for, and what they come to.

    shift: how much higher the losses of int8 are. breaks: the run that raises an error, and which.
    """

    def __init__(self):
        self.asked = []
        self.shift = 0.0
        self.breaks: tuple[tuple[str, int], BaseException] | None = None

    def train(self, config, base, images):
        assert base.name == "base" and images == 4 and config.max_train_steps == 8
        int8 = config.base_model_precision != "no_change"
        name = "int8 base" if int8 else "recompute full" if config.recompute else "fp32"
        self.asked.append((name, config.seed))
        if self.breaks is not None and self.breaks[0] == self.asked[-1]:
            raise self.breaks[1]
        loss = FP32[config.seed - 1] + (self.shift if int8 else 0.0)
        return Outcome(0.8, loss, Scores(0.9, 0.8), f"{int8} {config.seed}", 1.0)


@pytest.fixture
def trainings(monkeypatch):
    made = Trainings()
    monkeypatch.setattr(task, "train", made.train)
    monkeypatch.setattr(task, "score", lambda base, lora, images: Scores(0.0, 0.85))
    monkeypatch.setattr(task, "problems_of", lambda config: ())
    # drawing takes longer than all the rest
    monkeypatch.setattr(task, "write_task", lambda root: None)
    monkeypatch.setattr(plot, "draw", lambda records, settings, path: None)
    return made


@pytest.fixture
def quality(base, tmp_path):
    def run(*words, modes=WORDS, steps=8):
        return main(
            ["quality", "--base", str(base), "--out", str(tmp_path / "out"), "--steps", str(steps),
             "--images", "4", "--targets", TARGETS, "--modes", *modes, *words]
        )  # fmt: skip

    return run


def stored(tmp_path):
    return json.loads((tmp_path / "out" / "quality.json").read_text())


@pytest.mark.parametrize(("shift", "status"), [(0.019, 0), (0.021, 1)])
def test_a_mode_beyond_the_noise_is_red(trainings, quality, tmp_path, capsys, shift, status):
    trainings.shift = shift
    assert quality() == status
    every = {(name, seed) for name in WORDS for seed in (1, 2, 3)}
    assert len(trainings.asked) == 9 and set(trainings.asked) == every
    said = capsys.readouterr().out
    assert ("int8 base: evaluation loss: wanted within 2 deviations" in said) == bool(status)
    page = (tmp_path / "out" / "quality.md").read_text()
    verdict = "missed" if status else "met"
    row = f"| int8 base | {0.5 + shift:.4f} | 0.0100 | {shift:+.4f} | 0.0000 | 90 ± 0 | 80 ± 0 |"
    assert f"{row} {verdict} |" in page
    assert "| recompute full | 0.5000 | 0.0100 | same bits |  | 90 ± 0 | 80 ± 0 | met |" in page
    assert "| no LoRA | 0.8000 |  |  |  | 0 | 85 |  |" in page
    run = stored(tmp_path)["conditions"]["command"]
    assert run.startswith("fluxfast-bench quality --base base --steps 8 --images 4")


def test_the_table_fits_a_terminal(trainings, quality, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    quality(modes=["fp32", "int8 base"])
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if "int8 base" in line]
    assert " ".join(row) == "int8 base 0.5000 0.0100 +0.0000 90 ± 0 80 ± 0 met"


def test_an_interrupted_command_goes_on(trainings, quality, tmp_path, capsys):
    trainings.breaks = ("int8 base", 2), Stopped("SIGINT", tmp_path)
    assert quality() == 130
    assert "the same command goes on" in capsys.readouterr().err
    done, trainings.asked, trainings.breaks = trainings.asked[:-1], [], None
    assert done == [(name, 1) for name in WORDS] + [("fp32", 2)]
    assert quality() == 0
    assert "4 runs are there already" in capsys.readouterr().err
    assert ("int8 base", 2) in trainings.asked and not set(trainings.asked) & set(done)
    assert len(trainings.asked) == 5
    trainings.asked = []
    assert quality() == 0 and trainings.asked == []


def test_a_run_that_breaks_off_is_red_and_run_again(trainings, quality, tmp_path, capsys):
    trainings.breaks = ("int8 base", 2), RuntimeError("no memory")
    assert quality() == 1
    said = capsys.readouterr().out
    assert "int8 base: runs: wanted to the end, found RuntimeError: no memory" in said
    assert len(trainings.asked) == 9
    trainings.asked, trainings.breaks = [], None
    assert quality() == 0 and trainings.asked == [("int8 base", 2)]
    assert not [each for each in stored(tmp_path)["records"] if "failed" in each]


def test_other_settings_are_another_file(trainings, quality, base, tmp_path, capsys):
    assert quality(modes=["fp32"]) == 0
    before = stored(tmp_path)
    assert quality(modes=["fp32"], steps=9) == 1
    assert "holds runs of steps 8 and not 9; remove it" in capsys.readouterr().err
    (base / "model_index.json").write_text('{"another": "base"}')
    assert quality(modes=["fp32"]) == 1
    assert f"base {before['settings']['base']} and not" in capsys.readouterr().err
    assert stored(tmp_path) == before
    (tmp_path / "out" / "quality.json").write_text("[]")
    assert quality(modes=["fp32"]) == 1
    assert "not what `fluxfast-bench quality` writes" in capsys.readouterr().err


def test_a_mode_that_has_changed_is_run_again(trainings, quality, monkeypatch, capsys):
    assert quality() == 0
    trainings.asked = []
    changed = Mode("int8 base", "base", {**MODES["int8 base"].changes, "lora_rank": 4})
    monkeypatch.setitem(MODES, "int8 base", changed)
    assert quality() == 0
    assert trainings.asked == [("int8 base", seed) for seed in (1, 2, 3)]
    assert "changed since, and run again: int8 base" in capsys.readouterr().err


def test_a_mode_that_cannot_be_says_why(trainings, quality, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        task, "problems_of", lambda c: ("no such chip",) if c.recompute == "full" else ()
    )
    assert quality() == 0
    assert "not run, recompute full: no such chip" in capsys.readouterr().out
    assert "- not run, recompute full: no such chip" in (tmp_path / "out/quality.md").read_text()
    assert ("recompute full", 1) not in trainings.asked
    # on a machine where it can be
    monkeypatch.setattr(task, "problems_of", lambda config: ())
    assert quality() == 0 and ("recompute full", 3) in trainings.asked
    assert not [each for each in stored(tmp_path)["records"] if "reason" in each]


def test_requests_that_cannot_be(trainings, quality, tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality("--seeds", "1")
    assert "at least 2 seeds" in capsys.readouterr().err
    assert quality(modes=["int8 bas"]) == 1
    assert "did you mean 'int8 base'" in capsys.readouterr().err
    (tmp_path / "base" / "model_index.json").unlink()
    assert quality() == 1
    assert "expected a pipeline's folder" in capsys.readouterr().err
    assert trainings.asked == [] and not (tmp_path / "out").exists()
