"""The validation images of a run, found by the names of their files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# where they lie in the output folder
FOLDER = "validation_images"
_NAME = re.compile(r"step_(\d+)_(.+)_(\d+)_(\d+)x(\d+)\.(?:png|webp|jpe?g)")


@dataclass(frozen=True)
class DrawnImage:
    """A file `step_<step>_<nickname>_<index>_<W>x<H>.png`.

    Attributes:
        nickname: the prompt's, as a file's name has it (`files.safe_name`).
        index: among the images of the same prompt and size.
        size: (width, height) of what was drawn, which may stand beside other images in the file.
        is_left: whether it is at the left of them, and not at the right.
    """

    path: Path
    step: int
    nickname: str
    index: int
    size: tuple[int, int]
    is_left: bool = False

    def open(self) -> Image.Image:
        """What was drawn at this step: an end of a file that has more beside it.

        Raises OSError where the file is damaged.
        """
        with Image.open(self.path) as file:
            image = file.convert("RGB")
        if image.width > self.size[0]:
            left = 0 if self.is_left else image.width - self.size[0]
            image = image.crop((left, 0, left + self.size[0], image.height))
        return image


def drawn_images(folder: Path, references_at: str = "left") -> list[DrawnImage]:
    """The images in a folder, by prompt, size and index, then by step; [] if there is no folder.

    references_at: where references stand beside an image, unless the base's image stands there.
    """
    named = [
        (path, match)
        for path in (folder.glob("step_*") if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    # the base is drawn once, whatever weights a nickname's ending tells of later
    bases = [match[2] for _, match in named if match[1] == "0"]
    found = []
    for path, match in named:
        step, nickname = int(match[1]), match[2]
        beside_base = step > 0 and any(f"{nickname}_".startswith(f"{base}_") for base in bases)
        is_left = references_at == "right" and not beside_base
        size = int(match[4]), int(match[5])
        found.append(DrawnImage(path, step, nickname, int(match[3]), size, is_left))
    return sorted(found, key=lambda image: (image.nickname, image.size, image.index, image.step))


def newest_images(folder: Path, references_at: str = "left") -> list[DrawnImage]:
    """Of each prompt, size and index the image of the last step that drew any of the adapter's."""
    drawn = [image for image in drawn_images(folder, references_at) if image.step > 0]
    last = max((image.step for image in drawn), default=0)
    return [image for image in drawn if image.step == last]
