"""The toy world's drawings, and the checker that tells what they show."""

import itertools

import numpy as np
import pytest
from PIL import Image

from fluxfast.demo.toy_checker import check
from fluxfast.demo.toy_objects import OBJECTS, SUBJECT
from fluxfast.demo.toy_places import PLACES
from fluxfast.demo.toy_style import linocut, share_in_ink
from fluxfast.demo.toyworld import (
    COLOURS,
    SIZE,
    Scene,
    draw,
    draw_background,
    scenes,
    subject_scenes,
)

SCENE = Scene("cat", "red", "beach", "day", "clear", 5)


def test_a_scene_is_drawn_the_same_each_time_and_another_seed_differs():
    first = np.asarray(draw(SCENE), int)
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, np.asarray(draw(SCENE)))
    assert np.abs(first - np.asarray(draw(SCENE._replace(seed=6)))).mean() > 2


@pytest.mark.parametrize("size", [63, 256])
def test_other_sizes_show_the_same(size):
    drawn, small = draw(SCENE, size), draw(SCENE)
    assert drawn.size == (size, size)
    scaled = np.asarray(drawn.resize(small.size, Image.Resampling.BOX), int)
    # edges lie elsewhere within a pixel
    assert np.abs(scaled - np.asarray(small)).mean() < 6


def test_captions_say_what_is_shown():
    assert SCENE.caption == "a red cat on a beach by day, clear sky"
    night = Scene("house", "orange", "snow", "night", "rainy", 0)
    assert night.caption == "an orange house in the snow at night, rain"
    every = {
        Scene(*kind, "day", "clear", 0).caption
        for kind in itertools.product(OBJECTS, COLOURS, PLACES)
    }
    assert len(every) == len(OBJECTS) * len(COLOURS) * len(PLACES)


def test_held_out_combinations_are_drawn_only_when_asked_for():
    def combinations(held_out):
        drawn = list(scenes(0, 3000, held_out=held_out))
        assert len({scene.seed for scene in drawn}) > 2990
        return {scene[:3] for scene in drawn}

    trained, held_out = combinations(False), combinations(True)
    assert not trained & held_out
    # every object, colour and place is trained, and held out in some combination
    for known in (trained, held_out):
        for index, every in enumerate((OBJECTS, COLOURS, PLACES)):
            assert {each[index] for each in known} == set(every)
    total = len(OBJECTS) * len(COLOURS) * len(PLACES)
    assert len(held_out) == total // 8 and len(trained) > 0.98 * (total - total // 8)


def test_the_same_seed_gives_the_same_scenes():
    assert list(scenes(3, 20)) == list(scenes(3, 20))
    assert list(scenes(3, 20)) != list(scenes(4, 20))


def test_the_checker_is_right_about_fresh_drawings():
    """At most 2 % of answers are wrong, on drawings of which nothing was chosen."""
    drawn = [*scenes(101, 100), *scenes(102, 100, held_out=True)]
    seen = [check(draw(scene)) for scene in drawn]
    for name in ("object", "colour", "place", "time"):
        wrong = [
            (scene.caption, answer)
            for scene, answer in zip(drawn, seen, strict=True)
            if getattr(scene, name) != getattr(answer, name)
        ]
        assert len(wrong) <= 0.02 * len(drawn), wrong


def test_the_checker_sees_through_blur_and_noise():
    noise = np.random.default_rng(0).normal(0, 12, (SIZE, SIZE, 3))
    right = 0
    for scene in scenes(103, 40):
        blurred = draw(scene).resize((48, 48), Image.Resampling.BICUBIC).resize((SIZE, SIZE))
        damaged = np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)
        answer = check(Image.fromarray(damaged))
        right += (answer.object, answer.colour, answer.place) == scene[:3]
    assert right >= 38


def test_no_object_is_seen_where_there_is_none():
    draws = np.random.default_rng(0)
    for _ in range(20):
        coarse = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        assert check(Image.fromarray(coarse).resize((SIZE, SIZE))).object == ""
    empty = [
        check(draw_background(place, time, "clear", 77))
        for place, time in itertools.product(PLACES, ("day", "night"))
    ]
    assert [answer.object for answer in empty] == [""] * len(empty)


def test_the_subject_is_told_from_all_that_a_base_knows():
    drawn = list(subject_scenes(104, 40))
    assert drawn[0].caption.startswith("a plonk ")
    answers = [check(draw(scene)) for scene in drawn]
    assert all(answer.object == SUBJECT and answer.colour == "" for answer in answers)
    assert sum(a.place == s.place for a, s in zip(answers, drawn, strict=True)) >= 39
    others = [scene for seed in (105, 106) for scene in scenes(seed, 20)]
    assert not any(check(draw(scene)).object == SUBJECT for scene in others)


def test_a_linocut_is_told_from_an_illustration():
    for scene in scenes(107, 40):
        assert share_in_ink(draw(scene)) < 0.6 < 0.8 < share_in_ink(linocut(scene))
    assert linocut(SCENE, 63).size == (63, 63)
