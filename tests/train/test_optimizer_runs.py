"""Runs with the optimisers and schedules of other packages: stopped and gone on with."""

import pytest
from kill_cases import Killed, kill_at, same_files
from safetensors.torch import load_file

from fluxfast.config.settings import ConfigError

SETTINGS = [
    {"optimizer": "optimi-lion"},
    {"optimizer": "optimi-stableadamw", "lr_scheduler": "sine", "lr_num_cycles": 2},
    {"optimizer": "bnb-lion8bit-paged", "lr_scheduler": "cosine_with_restarts"},
    {"optimizer": "bnb-adamw8bit", "optimizer_config": "min_8bit_size=64"},
    {"optimizer": "bnb-ademamix8bit-paged"},
    {"optimizer": "adamw_schedulefree", "lr_warmup_steps": 2},
    {"optimizer": "prodigy"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["optimizer"])
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(run, settings, monkeypatch):
    # it is drawn with the average in the middle, and trains on from the point beside it
    settings |= {"checkpoint_step_interval": 2, "validation_step_interval": 3}
    settings |= {"validation_prompt": "a cat", "validation_num_inference_steps": 1}
    whole, _ = run(name="whole", **settings)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **settings)
    killed, out = run(name="killed", **settings)
    assert "resumed from" in out.getvalue()
    assert same_files(whole, killed)
    assert any(t.any() for key, t in load_file(whole).items() if "lora_B" in key)


def test_what_an_optimiser_does_by_itself_is_told(run):
    _, out = run(optimizer="prodigy", max_grad_norm=1.0, lr_scheduler="linear", max_train_steps=1)
    told = " ".join(out.getvalue().split())
    for note in (
        '"lr_scheduler" is constant instead of linear: prodigy needs no schedule beside it',
        '"max_grad_norm" has no effect: prodigy bounds its updates itself',
        '"learning_rate" is 0.001: prodigy finds the rate itself',
    ):
        assert note in told


def test_an_argument_that_its_class_lacks_is_refused_before_anything_is_loaded(run):
    with pytest.raises(ConfigError, match="'optimi-lion' takes no beta7; it takes betas, "):
        run(optimizer="optimi-lion", optimizer_config="beta7=1")
