"""A flavour is one record: a new one is loaded, checked and noted without another line of code."""

import pytest

from config_helpers import load, only, refused
from fluxfast.config.flavours import FLAVOURS, Flavour

KLEIN = Flavour(
    "somebody/FLUX.1-Kontext-dev",
    architecture="flux-klein",
    takes_guidance=False,
    text_tokens=128,
    in_channels=128,
    few_steps=True,
    forced={"validation_guidance_real": 2.0, "flow_schedule_shift": 1.15},
    forced_because="klein draws with two passes",
    least_validation_steps=5,
    good_validation_steps=(6, 9),
    advice="klein likes 6 to 9",
    notes=("klein is new",),
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def klein(monkeypatch):
    monkeypatch.setitem(FLAVOURS, "klein", KLEIN)

    def load_klein(**keys):
        return load(model_flavour="klein", flux_fast_schedule=True, **keys)

    return load_klein


def test_without_its_record_a_flavour_is_refused():
    only(refused(model_flavour="klein"), '"model_flavour" is "klein": must be ')


def test_a_new_record_is_a_flavour(klein):
    config = klein(
        validation_guidance_real=1.5,
        validation_num_inference_steps=3,
        validation_negative_prompt="grey",
    )
    assert config.flavour is KLEIN
    assert config.transformer_source == ("somebody/FLUX.1-Kontext-dev", "transformer", None)
    assert (config.tokenizer_max_length, config.validation_guidance_real) == (128, 2.0)
    assert config.validation_num_inference_steps == 5
    assert config.flow_schedule_shift == 1.15
    assert [note for note in config.notes if "klein" in note] == [
        '"validation_guidance_real" is 2.0 instead of 1.5: klein draws with two passes',
        '"validation_num_inference_steps" is 5 instead of 3: klein draws with two passes',
        "klein is new",
        '"validation_num_inference_steps" is 5: klein likes 6 to 9',
    ]


def test_it_is_known_by_name(klein):
    (problem,) = refused(model_flavour="kontxt")
    assert problem.endswith(
        "must be 'krea', 'dev', 'schnell', 'kontext', 'fluxbooru', 'libreflux' or 'klein'"
    )
    (problem,) = refused(model_flavour="klein")
    assert problem.startswith('config.json: "model_flavour" klein is trained on its own few')


def test_an_option_that_it_forces_switches_others_on(klein):
    """It draws with two passes, so that the negative prompt is read."""
    assert not any("negative" in note for note in klein(validation_negative_prompt="x").notes)
    (note,) = [n for n in load(validation_negative_prompt="x").notes if "negative" in n]
    assert note.endswith(
        'only read with "validation_guidance_real" or "model_flavour" fluxbooru or '
        '"model_flavour" klein'
    )


def test_a_forced_shift_is_told(klein):
    by_sigmoid = load(model_flavour="klein", i_know_what_i_am_doing=True)
    assert by_sigmoid.schedule_text == "sigmoid, shift 1.15"
    by_resolution = load(
        model_flavour="klein", i_know_what_i_am_doing=True, flow_schedule_auto_shift=True
    )
    assert by_resolution.flow_schedule_shift == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_flavour": "dev"}, None),
        ({"model_flavour": "dev", "flux_guidance_value": 3.5}, "of 3.5"),
        ({"model_flavour": "krea", "flux_guidance_mode": "random-range"}, "drawn at random"),
        ({"model_flavour": "fluxbooru"}, "of 3.5"),
        # its transformer takes no guidance
        ({"model_flavour": "libreflux", "flux_guidance_value": 3.5}, None),
    ],
)
def test_guidance_in_training_tells_what_images_need(settings, told):
    notes = [note for note in load(**settings).notes if note.startswith("guidance in training")]
    assert len(notes) == (told is not None)
    assert all(f"is {told}," in note for note in notes)
    if settings["model_flavour"] == "fluxbooru":
        assert notes[0].endswith("(it is 6)")


def test_libreflux_tells_what_its_mask_is():
    notes = load(model_flavour="libreflux").notes
    assert any(note.startswith("no token attends to T5's padding") for note in notes)
