"""The validation images of a run: the names of their files, and how they are found by these.

A name is SimpleTuner's, `step_<step>_<nickname>_<index>_<W>x<H>`, with the step in six digits, so
that names sort as steps do, without spaces, and with `base` behind the nickname of what the base
model has drawn. Earlier versions wrote the step as it is; such files are found as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fluxfast.files import safe_name

# where they lie in the output folder
FOLDER = "validation_images"
# of what step 0 draws, in files' names
BASE = "base"
_NAME = re.compile(r"step_(\d+)_(.+)_(\d+)_(\d+)x(\d+)\.(?:png|webp|jpe?g)")


def file_words(nicknames: Iterable[str]) -> dict[str, str]:
    """What each of a run's nicknames is in files' names: one word, another one for each."""
    words: dict[str, str] = {}
    for nickname in nicknames:
        word = safe_name("-".join(nickname.split()))
        if word in words.values():
            word += "-" + hashlib.sha256(nickname.encode("utf-8", "replace")).hexdigest()[:8]
        words[nickname] = word
    return words


def file_name(
    step: int, word: str, index: int, size: tuple[int, int], extension: str = "png"
) -> str:
    """The file of an image. word: of the nickname, with a label of the weights behind it."""
    base = f"_{BASE}" if step == 0 else ""
    return f"step_{step:06d}_{word}{base}_{index}_{size[0]}x{size[1]}.{extension}"


def grid_name(step: int) -> str:
    """The file of the grid of a step."""
    return f"grid_step_{step:06d}.png"


@dataclass(frozen=True)
class DrawnImage:
    """A file of an image.

    Attributes:
        nickname: the prompt's, as a file's name has it (`file_words`).
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
        width, height = self.size
        left = 0 if self.is_left else max(0, image.width - width)
        # what stands above images side by side says which is which
        top = max(0, image.height - height)
        return image.crop((left, top, min(image.width, left + width), image.height))


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
    bases = [_nickname(match) for _, match in named if int(match[1]) == 0]
    found = []
    for path, match in named:
        step, nickname = int(match[1]), _nickname(match)
        beside_base = step > 0 and any(f"{nickname}_".startswith(f"{base}_") for base in bases)
        is_left = references_at == "right" and not beside_base
        size = int(match[4]), int(match[5])
        found.append(DrawnImage(path, step, nickname, int(match[3]), size, is_left))
    return sorted(found, key=lambda image: (image.nickname, image.size, image.index, image.step))


def _nickname(match: re.Match[str]) -> str:
    """The nickname in a file's name, without what marks the base model's image."""
    is_base = match[1] == "000000"
    return match[2].removesuffix(f"_{BASE}") if is_base else match[2]


def newest_images(folder: Path, references_at: str = "left") -> list[DrawnImage]:
    """Of each prompt, size and index the image of the last step that drew any of the adapter's."""
    drawn = [image for image in drawn_images(folder, references_at) if image.step > 0]
    last = max((image.step for image in drawn), default=0)
    return [image for image in drawn if image.step == last]
