"""An option is a field, its use and its test: no other file names it."""

import pytest

from config_helpers import load, only, refused
from fluxfast.config import run
from fluxfast.config.datasets import ImageDataset
from fluxfast.config.option import OptionFacts, facts_of, option
from fluxfast.config.run import TrainConfig
from fluxfast.config.simpletuner import options
from fluxfast.train import resume
from fluxfast.train.state import SavedRun

PHOTOS = ImageDataset(
    id="photos",
    instance_data_dir="i",
    cache_dir_vae="c",
    resolution=64,
    resolution_type="pixel_area",
    caption_strategy="filename",
)


class LongerConfig(TrainConfig):
    """The config with three options more."""

    gradient_noise: float = option(
        0.25, ge=0, only_with="loss_type=huber", aliases=("grad_noise",), ours=True
    )
    """Standard deviation of noise that is added to gradients."""
    noise_colour: str = option("white", on_resume="ignored", ours=True)
    """Colour of that noise."""
    noise_groups: int = option(1, on_resume="refused", ours=True)
    """Groups of parameters that share a draw."""


@pytest.fixture(autouse=True)
def _longer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "TrainConfig", LongerConfig)


def test_it_is_loaded_and_checked():
    assert load().gradient_noise == 0.25
    assert load(gradient_noise="0.5", loss_type="huber").gradient_noise == 0.5
    assert load(grad_noise=0.5, loss_type="huber").gradient_noise == 0.5
    only(refused(gradient_noise=-1), '"gradient_noise" is -1: ')
    only(refused(grad_noise=1, gradient_noise=1), '"grad_noise" and "gradient_noise" are the same')


@pytest.mark.parametrize("typo", ["gradient_nois", "grad_noisee"])
def test_a_typing_error_suggests_it(typo):
    only(refused(**{typo: 1}), f'"{typo}" is not an option; did you mean "grad')


def test_a_note_says_where_nothing_reads_it():
    def notes(**keys):
        return [note for note in load(**keys).notes if "noise" in note]

    assert notes(gradient_noise=0.5) == [
        '"gradient_noise" has no effect: only read with "loss_type" huber'
    ]
    assert notes(gradient_noise=0.25) == notes(gradient_noise=0.5, loss_type="huber") == []


def test_a_resumed_run_compares_it():
    def settings(config):
        return resume.settings(config, [PHOTOS], seed=7, steps=9)

    saved = SavedRun("ckpt", {"global_step": 2, "seed": 7, "settings": settings(load())}, {}, {})
    changed = load(loss_type="l2", gradient_noise=0.5, noise_colour="pink")
    assert resume.notes(saved, settings(changed)) == [
        '"gradient_noise" was 0.25 and is 0.5 from step 3 on'
    ]
    saved.state["fixed"] = resume.fixed(load())
    saved.state["sampler"] = {}
    assert resume.refused(load(noise_groups=2), saved, [PHOTOS]) == [
        "noise_groups 1, this run has 2"
    ]


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_field_is_simpletuners_or_says_that_it_is_ours(name):
    assert (name in options()) != facts_of(TrainConfig.model_fields[name]).ours


def test_a_plain_field_says_nothing():
    assert facts_of(TrainConfig.model_fields["learning_rate"]) == OptionFacts()
