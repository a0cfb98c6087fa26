"""`fluxfast-bench trainers`: other trainers' models and adapters, plain and accelerated."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fluxfast_bench.main import main
from fluxfast_bench.report import trainers_sections
from fluxfast_bench.report.results import Result, read_all
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.trainers import case, trainers, worker
from fluxfast_bench.trainers.hosts import diffusers_peft
from fluxfast_bench.trainers.importing import code_of, require


@pytest.fixture
def checkout(tmp_path):
    """A trainer's checkout, whose code imports a package that nobody has."""
    (tmp_path / "its_code").mkdir()
    (tmp_path / "its_code" / "models.py").write_text(
        "import no_such_package.part as part\n"
        "from no_such_package import Something\n"
        "class Model(Something):\n"
        "    pass\n"
    )
    (tmp_path / "its_code" / "__init__.py").write_text("")
    yield tmp_path
    for name in list(sys.modules):
        if name.startswith(("its_code", "no_such_package")):
            del sys.modules[name]


def test_a_package_that_is_missing_is_empty_for_the_trainer_alone(checkout):
    before, finders = list(sys.path), list(sys.meta_path)
    with code_of(checkout) as empty:
        # nobody else is told that it is there
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_package")
        from its_code.models import Model

        assert Model.__mro__[1].__name__ == "Something" and empty == {"no_such_package"}
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("its_code.not_there")
    assert sys.meta_path == finders and sys.path == before


def test_a_case_may_need_a_package_that_is_no_empty_one(checkout):
    with code_of(checkout):
        from its_code import models  # noqa: F401

        require("torch")
        with pytest.raises(ImportError, match="takes the package no_such_package, which is not"):
            require("no_such_package")


def test_a_package_that_a_trainer_can_do_without_is_missing(checkout):
    with code_of(checkout, optional=("no_such_package",)) as empty:
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            importlib.import_module("its_code.models")
        assert not empty


def test_every_case_of_diffusers_runs_fused_and_equal():
    for name, make in diffusers_peft.CASES.items():
        record = case.measure(make, SHAPES["tiny"], rounds=1)
        assert record["blocks_fused"] == record["blocks"] == 2, name
        assert record["linears_fused"] == record["linears"] == 17
        assert record["adapters_fused"] == record["adapters"] == 17
        assert not record["remains"] and record["ratio"] > 0
        assert max(record[error] for error in case.ERRORS) < case.SAME, name


def drawing(shape):
    """A program's case, which trains nothing."""
    made = diffusers_peft.lora(shape)
    return case.Case(made.model.requires_grad_(False), [], made.call, same=1e-5)


def test_a_case_that_only_draws():
    record = case.measure(drawing, SHAPES["tiny"], rounds=1)
    assert record["blocks_fused"] == record["blocks"] == 2 and record["ratio"] > 0
    assert "gradient_error" not in record and "two_steps_error" not in record
    assert case.worst_error(record) == "output_error" and record["output_error"] < 1e-5
    named = {"contestant": "a", "mode": "inference"}
    assert trainers.violations([record | named]) == []
    (line,) = trainers.violations([record | named | {"output_error": 2e-5}])
    assert line == "a, inference: output_error is 2e-05, at most 1e-05"
    assert trainers.table_of([record | named]).row_count == 1
    # beside one that the checkout has not
    absent = {"contestant": "a", "mode": "inference, fp8", "absent": "this checkout has no fp8"}
    records = [{"case": "tiny"} | record | named, {"case": "tiny"} | absent]
    stored = Result("a CPU", Path("trainers.json"), stored_run(records))
    assert "| a | inference |  | 2 of 2 |" in trainers_sections.by_case([stored])
    assert "| a | inference |  | 2 of 2 |" in trainers_sections.by_trainer([stored])


def stored_run(records):
    made = {"date": "2026-11-29", "commit": "abc", "command": "fluxfast-bench trainers"}
    conditions = {"device": "a CPU", "versions": {"torch": "2.13"}, **made}
    return {"kind": "trainers", "conditions": conditions, "records": records}


def test_a_case_of_something_that_a_checkout_has_not(monkeypatch):
    def absent(shape):
        raise case.Absent("this checkout has no fp8")

    def broken(shape):
        return nn.Linear(1, 1).no_such_attribute

    cases = types.SimpleNamespace(CASES={"inference, fp8": absent, "LoRA": broken})
    monkeypatch.setattr(worker, "_module", lambda _: cases)
    # it is meant for a process of its own
    monkeypatch.setattr(worker.logging, "disable", lambda _: None)
    monkeypatch.setattr(worker.warnings, "simplefilter", lambda _: None)
    sent = []
    worker.measure_trainer("its own", None, "tiny", 1, sent.append)
    assert ("absent", "inference, fp8", "this checkout has no fp8") in sent
    assert [kind for kind, *_ in sent] == ["start", "absent", "start", "failed", "done"]
    record = {"contestant": "a", "mode": "inference, fp8", "absent": "this checkout has no fp8"}
    assert not case.was_measured(record) and trainers.violations([record]) == []
    assert trainers.table_of([record]).row_count == 1


def hooked(shape):
    made = diffusers_peft.lora(shape)
    made.model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
    return made


def test_what_remains_is_counted_with_its_reason():
    record = case.measure(hooked, SHAPES["tiny"], rounds=1)
    assert (record["blocks_fused"], record["blocks"]) == (1, 2)
    assert (record["adapters_fused"], record["adapters"]) == (16, 17)
    assert record["remains"] == {"it has hooks": 1}


def test_errors_are_seen():
    tensors = [torch.ones(3), None]
    assert case.error_of(tensors, tensors) == 0
    assert case.error_of([torch.full((3,), 1.5)], [torch.ones(3)]) == 0.5
    assert case.error_of([None], [torch.ones(3)]) == float("inf")
    assert case.error_of([torch.full((3,), float("nan"))], [torch.ones(3)]) == float("inf")
    good = dict.fromkeys(case.ERRORS, 1e-6) | {"contestant": "a", "mode": "LoRA"}
    assert trainers.violations([good]) == []
    assert trainers.violations([good | {"gradient_error": 1e-3}]) == [
        "a, LoRA: gradient_error is 0.001, at most 0.0001"
    ]
    assert trainers.violations([{"contestant": "a", "mode": "LoRA", "reason": "it broke"}]) == [
        "a, LoRA: it broke"
    ]


def test_the_command_stores_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    folder = tmp_path / "no trainer's"
    folder.mkdir()
    words = ["--shape", "tiny", "--rounds", "1", "--results", str(tmp_path / "results")]
    # a folder without the trainer's code: each of its cases says so
    given = ["--host-path", f"sd-scripts={folder}", f"--host-path=comfyui={folder}"]
    assert main(["trainers", *words, *given]) == 1
    said = capsys.readouterr()
    assert "sd-scripts, LoRA: ModuleNotFoundError: No module named 'library'" in said.err
    assert "comfyui, inference, plain: ModuleNotFoundError: No module named 'comfy'" in said.err
    assert "diffusers" in said.out and "2 of 2" in said.out
    (stored,) = read_all(tmp_path / "results")
    text = json.dumps(stored.data)
    assert str(folder) not in text and "sd-scripts=…" in stored.data["conditions"]["command"]
    table = trainers_sections.by_trainer([stored])
    assert (
        "| diffusers + PEFT | LoRA (checkpointing, nf4 base), DoRA, LoKr, LoHa |  | 12 of" in table
    )
    assert "Not measured: sd-scripts, LoRA (" in trainers_sections.by_case([stored])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host-path", "kohya=."], "kohya"),
        (["--host-path", "sd-scripts"], "expected sd-scripts=FOLDER"),
        (["--host-path", "sd-scripts=/no/such/folder"], "no folder"),
        (["--only", "musubi-tuner"], "musubi-tuner"),
        (["--shape", "huge"], "huge"),
    ],
)
def test_words_that_name_nothing(words, said, capsys):
    assert main(["trainers", *words]) == 1
    assert said in capsys.readouterr().err
