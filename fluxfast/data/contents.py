"""What a dataset's table or remote store says of its images, beside the files themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """An image that is left out: `reason` is shared by many, `detail` says more of this one."""

    file: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Contents:
    """Files are paths below the dataset's folder, with slashes.

    files: the images that belong to the dataset; None: all that its folder holds.
    captions: each image's, where they come from a table.
    sizes: each image's (width, height) as a table says.
    skipped: images that could not be brought here.
    notes: lines for the user.
    """

    files: frozenset[str] | None = None
    captions: Mapping[str, Sequence[str]] | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
