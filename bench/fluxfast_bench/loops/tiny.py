"""What the trainers' scripts are given: the toy base, and pictures of its world."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxfast.demo import BASE
from fluxfast.demo.folder import write_captioned
from fluxfast.demo.toyworld import draw, scenes

# a small FLUX.1 pipeline in diffusers' layout, with text encoders and autoencoder
PIPELINE = BASE


def write_pictures(folder: Path, count: int = 2, side: int = 64, *, captions: bool = True) -> Path:
    """Writes square pictures, each with its caption in a .txt file beside it; returns `folder`."""
    for number, scene in enumerate(scenes(seed=1, count=count)):
        picture = folder / f"{number}.png"
        write_captioned(picture, draw(scene, side), scene.caption)
        if not captions:
            picture.with_suffix(".txt").unlink()
    return folder


def logged(folder: Path, tag: str) -> list[float]:
    """The values that a script has logged for TensorBoard by one name, anywhere below a folder."""
    values: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return [values[step] for step in sorted(values)]
