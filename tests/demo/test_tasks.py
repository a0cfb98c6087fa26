"""What the demos teach: their scenes, captions and checks."""

import pytest

from fluxfast.demo.tasks import (
    TASKS,
    TRAINING_IMAGES,
    old_scenes,
    regularisation_scenes,
    share_shown,
    shows_scene,
)
from fluxfast.demo.toyworld import draw


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_all_that_is_trained_on_shows_what_is_new_and_is_not_asked_for(task):
    trained, asked = task.training_scenes(), task.asked_scenes(40)
    assert len(trained) == TRAINING_IMAGES == 16
    assert all(task.shows(task.draw(scene), scene) for scene in trained)
    assert not {scene.seed for scene in trained} & {scene.seed for scene in asked}


def test_captions_have_the_word_for_what_is_new():
    subject, style = (TASKS[name] for name in ("subject", "style"))
    assert all(subject.caption(s).startswith("a plonk ") for s in subject.training_scenes())
    for scene in style.training_scenes():
        assert style.caption(scene) == f"a linocut of {scene.caption}"
        assert "plonk" not in scene.caption
    assert not any(scene.is_held_out for scene in regularisation_scenes())
    assert all(scene.is_held_out for scene in old_scenes(40))
    assert not any("plonk" in scene.caption for scene in old_scenes(40))


def test_what_a_base_draws_at_best_does_not_count_as_new():
    scenes = old_scenes(10)
    drawn = [draw(scene) for scene in scenes]
    for task in TASKS.values():
        assert share_shown(drawn, scenes, task.shows) == 0
    assert share_shown(drawn, scenes) >= 0.9


def test_a_subject_must_be_at_its_place_and_an_old_scene_have_its_colour():
    task = TASKS["subject"]
    beach = task.asked_scenes(1)[0]._replace(place="beach", time="day")
    assert task.shows(draw(beach), beach)
    assert not task.shows(draw(beach), beach._replace(place="city"))
    cat = beach._replace(object="cat", colour="red")
    assert shows_scene(draw(cat), cat)
    for change in ({"colour": "green"}, {"object": "car"}, {"place": "forest"}):
        assert not shows_scene(draw(cat), cat._replace(**change))
