"""What a demo teaches the toy base: a subject under a made-up word, or a style of drawing.

Each task has its training images, the prompts that ask for what is new, and a test that tells from
an image's pixels whether it shows it. What the base knew before is asked for in `old_scenes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from fluxfast.demo.toy_checker import check
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.demo.toy_style import linocut, share_in_ink
from fluxfast.demo.toyworld import Scene, draw, scenes, subject_scenes

TRAINING_IMAGES = 16
# images of what the base knows, on which a LoRA is held to what the base does
REGULARISATION_IMAGES = 256
# illustrations have less than 0.6 of their pixels in the linocut's inks, linocuts more than 0.8
_LEAST_IN_INK = 0.7
# what an image shows that counts as right for an old caption, for people
OLD_SHOWN = "the right object, colour and place"
# seeds of the scenes to train on, of those to be asked for, and of those that regularise; the
# settings of the demo were chosen on scenes of other seeds, 112 and 113
_TRAINED, _ASKED, _OLD, _REGULAR = 1, 12, 13, 4


@dataclass(frozen=True)
class Task:
    """Something new for a model to learn.

    Attributes:
        name: the demo's word for it.
        title: what is taught, for people, after "taught" or "teach".
        shown: what an image shows that counts as right, for people.
        scenes: (seed, count) to as many scenes of it.
        draw: a scene as it is to be drawn.
        caption: what is said of a scene.
        shows: whether an image shows what its scene asks for.
        learning_rate: which one teaches it.
        regularised: the share of the steps on regularisation images, from 0 to 1. A style touches
            all of a picture, so it takes more of them, at a lower rate, to leave old captions be.
    """

    name: str
    title: str
    shown: str
    scenes: Callable[[int, int], Iterable[Scene]]
    draw: Callable[[Scene], Image.Image]
    caption: Callable[[Scene], str]
    shows: Callable[[Image.Image, Scene], bool]
    learning_rate: float
    regularised: float

    def training_scenes(self) -> list[Scene]:
        return list(self.scenes(_TRAINED, TRAINING_IMAGES))

    def asked_scenes(self, count: int) -> list[Scene]:
        """Scenes that are not trained on, to ask a model for."""
        return list(self.scenes(_ASKED, count))


def _shows_subject(image: Image.Image, scene: Scene) -> bool:
    seen = check(image)
    return seen.object == SUBJECT and seen.place == scene.place


def _is_linocut(image: Image.Image, scene: Scene) -> bool:
    return share_in_ink(image) > _LEAST_IN_INK


def shows_scene(image: Image.Image, scene: Scene) -> bool:
    """Whether an image has the object, in its colour, at the place that the scene has."""
    return check(image)[:3] == scene[:3]


def share_shown(
    images: Sequence[Image.Image],
    asked: Sequence[Scene],
    shows: Callable[[Image.Image, Scene], bool] = shows_scene,
) -> float:
    """The share of images that show what was asked for, from 0 to 1."""
    return sum(map(shows, images, asked)) / len(asked)


def old_scenes(count: int) -> list[Scene]:
    """Scenes of what the toy base knows, in combinations that it was not trained on."""
    return list(scenes(_OLD, count, held_out=True))


def regularisation_scenes() -> list[Scene]:
    """Scenes of what the toy base knows, in combinations that it was trained on."""
    return list(scenes(_REGULAR, REGULARISATION_IMAGES))


def _of_style(scene: Scene) -> str:
    return f"a linocut of {scene.caption}"


TASKS = {
    task.name: task
    for task in (
        Task(
            "subject",
            f'what a "{SUBJECT}" is',
            f"a {SUBJECT}, at the place asked for",
            subject_scenes,
            draw,
            lambda scene: scene.caption,
            _shows_subject,
            learning_rate=4e-3,
            regularised=0.5,
        ),
        Task(
            "style",
            "to draw linocuts",
            "nearly all pixels in the four inks",
            scenes,
            linocut,
            _of_style,
            _is_linocut,
            learning_rate=3e-3,
            regularised=0.75,
        ),
    )
}
