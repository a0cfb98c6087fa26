"""A finished run that is started again: told at once, with what trains it on, and left as it is."""

import pytest
from kill_cases import Killed

from fluxfast.adapters.writing import file_of
from fluxfast.train import trainer
from fluxfast.train.rounds import Rounds
from fluxfast.train.run_events import EVENTS_NAME, read_events

FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0}
EPOCH = {"max_train_steps": None, "num_train_epochs": 1, "dataset": {"repeats": 2}}


def times(lora):
    """When each file of a run's folder was written last."""
    return {path: path.stat().st_mtime_ns for path in lora.parent.rglob("*") if path.is_file()}


def test_it_is_told_before_the_data_are_looked_at(run, monkeypatch):
    lora, _ = run(**FP32, max_train_steps=2)
    before = times(lora)
    monkeypatch.setattr(trainer, "load_data", None)
    again, out = run(**FP32, max_train_steps=2)
    assert again == lora and times(lora) == before
    told = out.getvalue()
    assert "This run is complete: 2 steps are trained." in told and str(lora) in told
    assert 'raise "max_train_steps" above 2 (it is 2)' in told and len(told.splitlines()) == 4
    # of a run that was longer, the steps that it has
    _, out = run(**FP32, max_train_steps=1)
    assert 'raise "max_train_steps" above 2 (it is 1)' in out.getvalue()


def test_by_epochs_before_a_model_is_loaded(run, monkeypatch):
    lora, _ = run(**FP32, **EPOCH)
    loaded = trainer.load_parts
    monkeypatch.setattr(trainer, "load_parts", None)
    _, out = run(**FP32, **EPOCH)
    assert "complete: 6 steps" in out.getvalue()
    assert 'raise "num_train_epochs" above 1' in out.getvalue()
    events = read_events(lora.parent / EVENTS_NAME)
    assert not [event for event in events if event["type"] == "error"]
    # where the same epochs have become longer, there are steps to train
    monkeypatch.setattr(trainer, "load_parts", loaded)
    _, out = run(**FP32, **EPOCH | {"dataset": {"repeats": 3}})
    assert "step 6 of 8" in out.getvalue()


def test_one_that_has_an_end_to_come_goes_on(run, monkeypatch):
    def die(self, step, *, is_last=False):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Rounds, "draw", die)
        with pytest.raises(Killed):
            run(**FP32, max_train_steps=2, validation_step_interval=0, disable_benchmark=True)
    lora, out = run(**FP32, max_train_steps=2)
    assert "step 2 of 2" in out.getvalue() and lora == file_of(lora.parent)
    # a further step is trained, and so is a run that asks for a fresh start
    _, out = run(**FP32, max_train_steps=3)
    assert "step 2 of 3" in out.getvalue()
    _, out = run(**FP32, max_train_steps=3, resume_from_checkpoint="")
    assert "complete" not in out.getvalue() and "resumed" not in out.getvalue()


def test_a_config_of_another_run_is_refused_as_ever(run):
    run(**FP32, max_train_steps=2)
    with pytest.raises(ValueError, match="lora_rank 3, this run has 8"):
        run(**FP32, max_train_steps=2, lora_rank=8)
