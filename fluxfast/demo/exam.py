"""What a model is asked before and after it is taught, and how much of it it gets right.

It is asked for what is new in scenes that are not trained on, and for what the toy base knew
before. A checker tells from each image's pixels whether it shows what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from fluxfast.demo.tasks import Task, old_scenes, shows_scene
from fluxfast.demo.toyworld import Scene


class Question(NamedTuple):
    """One prompt.

    Attributes:
        prompt: what the model reads.
        scene: what its image should show.
        is_new: whether it asks for what is taught; else for what the base knew.
    """

    prompt: str
    scene: Scene
    is_new: bool


class Scores(NamedTuple):
    """The shares of images that show what was asked for, from 0 to 1."""

    new: float
    old: float


@dataclass
class Answers:
    """A model's images of the first questions, in their order; `Exam.mark` fills `right`.

    Attributes:
        images: one of each question so far.
        right: whether each of them shows what was asked for.
    """

    images: list[Image.Image] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


class Exam:
    """A task's questions, the same for every model.

    count: how many ask for what is new, and how many for what is old. Of each kind, the first
    SHOWN come before all others, since they stand in the picture.
    """

    # columns of the picture: what is new, and what is old
    SHOWN = (5, 2)

    def __init__(self, task: Task, count: int) -> None:
        self.task = task
        new = [Question(task.caption(scene), scene, True) for scene in task.asked_scenes(count)]
        old = [Question(scene.caption, scene, False) for scene in old_scenes(count)]
        shown_new, shown_old = self.SHOWN
        first = new[:shown_new] + old[:shown_old]
        self.questions = first + new[shown_new:] + old[shown_old:]
        self.shown = len(first)

    def mark(self, answers: Answers) -> None:
        """Tell of the next unmarked image whether it is right."""
        place = len(answers.right)
        question, image = self.questions[place], answers.images[place]
        shows = self.task.shows if question.is_new else shows_scene
        answers.right.append(shows(image, question.scene))

    def scores(self, answers: Answers) -> Scores:
        """Of all questions' images, which must be marked."""
        assert len(answers.right) == len(self.questions)
        return Scores(
            self._share(answers.right, is_new=True), self._share(answers.right, is_new=False)
        )

    def _share(self, right: Sequence[bool], *, is_new: bool) -> float:
        asked = [each for each, q in zip(right, self.questions, strict=True) if q.is_new == is_new]
        return sum(asked) / len(asked)
