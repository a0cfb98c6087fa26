"""The demo's picture: each part is where it should be, from images of plain colours."""

import numpy as np
import pytest
from PIL import Image

from fluxfast.demo.exam import Answers, Exam, Scores
from fluxfast.demo.picture import (
    BLUE,
    CELL,
    GAP,
    VERMILION,
    WIDTH,
    Contents,
    column,
    draw_picture,
    picture,
)
from fluxfast.demo.tasks import TASKS

RED, GREEN, PURPLE = (200, 30, 30), (30, 160, 30), (120, 40, 160)
EXAM = Exam(TASKS["subject"], 5)


def plain(colour, count=1):
    return [Image.new("RGB", (128, 128), colour)] * count


def pixels(**contents):
    given = {"trained": plain(PURPLE, 16), "subtitle": "", "base": Answers(plain(RED, 7))}
    return np.asarray(picture(EXAM, Contents(**given | contents)))


def rows_of(image, colour, x):
    return np.flatnonzero((image[:, x] == colour).all(1))


def is_drawn(image, colour):
    """How many pixels have a colour that is written as #rrggbb."""
    return (image == tuple(bytes.fromhex(colour[1:]))).all(2).sum()


@pytest.mark.parametrize("number", range(7))
def test_the_answers_of_a_prompt_stand_below_one_another(number):
    image = pixels(lora=Answers(plain(GREEN, 7)))
    x = column(EXAM, number) + CELL // 2
    base, lora = rows_of(image, RED, x), rows_of(image, GREEN, x)
    assert len(base) == len(lora) == CELL
    assert base[-1] - base[0] == CELL - 1 and lora[0] == base[-1] + GAP + 1
    # and end before the next
    assert not len(rows_of(image, RED, column(EXAM, number) - 2))
    assert len(rows_of(image, RED, column(EXAM, number) + CELL - 1)) == CELL


def test_all_training_images_are_shown():
    image = pixels()
    assert image.shape[1] == WIDTH
    assert is_drawn(image, "#{:02x}{:02x}{:02x}".format(*PURPLE)) == 16 * 96 * 96


def test_the_first_picture_has_places_for_what_comes_later():
    first, last = pixels(), pixels(lora=Answers(plain(GREEN, 7)))
    assert first.shape == last.shape
    assert not is_drawn(first, BLUE)


def test_marks_say_which_answers_are_right():
    none, right, wrong = (
        pixels(base=Answers(plain(RED, 7), marks)) for marks in ([], [True] * 7, [False] * 7)
    )
    assert not is_drawn(none, BLUE) + is_drawn(none, VERMILION)
    assert is_drawn(right, BLUE) > 7 * 200 and not is_drawn(right, VERMILION)
    assert is_drawn(wrong, VERMILION) > 7 * 200 and not is_drawn(wrong, BLUE)


def test_scores_and_losses_are_drawn_right_of_the_training_images():
    without = pixels()
    for contents in (
        {"scores": (Scores(0.0, 0.9), Scores(0.95, 0.85))},
        {"losses": {1: 1.0, 2: 0.5, 4: 0.4}},
        {"losses": {3: 1.0}},
    ):
        changed = np.argwhere((pixels(**contents) != without).any(2))
        assert len(changed) > 500
        (top, left), (bottom, right) = changed.min(0), changed.max(0)
        assert left > 40 + 4 * 96 and right < WIDTH - 20
        first_answer = rows_of(without, RED, column(EXAM, 0) + 9)[0]
        assert 100 < top < bottom < first_answer - 100


def test_the_title_fits():
    for task in TASKS.values():
        exam = Exam(task, 5)
        image = np.asarray(picture(exam, Contents(plain(PURPLE, 16), "", Answers(plain(RED, 7)))))
        assert (image[:, -20:] == 255).all()


def test_the_file_is_whole(tmp_path):
    draw_picture(EXAM, Contents(plain(PURPLE, 16), "x", Answers(plain(RED, 7))), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width == WIDTH
        image.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
