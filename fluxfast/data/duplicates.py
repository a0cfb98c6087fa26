"""Images that are in a dataset twice: equal files, and images that look the same.

An image's *print* is its miniature of 9x9 pixels. Two images look the same if their *hashes* differ
in at most `MAX_BITS` of 144 bits and in at most a quarter of those that are set in either, and if
no colour of their miniatures differs by more than `MAX_COLOUR` of 255. The hash (dHash, in both
directions) says of every two neighbours in the grey miniature whether the second is brighter: it
survives another size, another format and other brightness. The colours tell apart what has little
structure, such as a red and a blue area, or different small objects on white.

Not all pairs are compared. The hash is cut into 9 words of 16 bits, of which two hashes that differ
in 8 bits or less have one in common; so it is enough to compare those images that share a word.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

K = TypeVar("K", bound=Hashable)

EDGE = 9
MAX_BITS = 8
MAX_COLOUR = 64
# a step of fewer grey levels is no step: an even area would give a hash of its noise
_MARGIN = 2.0
_WORDS = 9
assert _WORDS > MAX_BITS


def image_print(img: Image.Image) -> bytes:
    """The miniature of an RGB image: 9x9 pixels of three bytes."""
    return img.resize((EDGE, EDGE), Image.Resampling.BOX).tobytes()


def image_hashes(prints: Sequence[bytes]) -> np.ndarray:
    """The hash of each print, as uint16 [N, 9]."""
    colours = np.frombuffer(b"".join(prints), np.uint8).reshape(-1, EDGE, EDGE, 3)
    grey = colours.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    across = (grey[:, :, 1:] - grey[:, :, :-1]).reshape(-1, EDGE * (EDGE - 1))
    down = (grey[:, 1:] - grey[:, :-1]).reshape(-1, EDGE * (EDGE - 1))
    steps = np.concatenate([across, down], axis=1) > _MARGIN
    # a word takes its bits from all over the image, since neighbours tend to be equal: in many
    # images of objects on white, the whole first row is
    scattered = steps.reshape(-1, 16, _WORDS).transpose(0, 2, 1)
    return np.ascontiguousarray(np.packbits(scattered, axis=2)).view(np.uint16)[..., 0]


def equal_files(names: Sequence[K], hashes: Sequence[str]) -> list[list[K]]:
    """The groups of names that have one content, by the files' hashes."""
    groups: dict[str, list[K]] = defaultdict(list)
    for name, sha256 in zip(names, hashes, strict=True):
        groups[sha256].append(name)
    return [group for group in groups.values() if len(group) > 1]


def near_images(names: Sequence[K], prints: Sequence[bytes]) -> list[list[K]]:
    """The groups of names whose images look the same, each group in the given order.

    An image belongs to a group if it looks like any other of the group.
    """
    # thousands of equal prints, such as those of blank pages, are one to compare
    distinct = list(dict.fromkeys(prints))
    place = {found: i for i, found in enumerate(distinct)}
    leader = _leaders(distinct)
    groups: dict[int, list[K]] = defaultdict(list)
    for name, found in zip(names, prints, strict=True):
        groups[int(leader[place[found]])].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _leaders(prints: Sequence[bytes]) -> np.ndarray:
    """For each print, the first one of its group, as int64 [N]."""
    leader = np.arange(len(prints))
    hashes = image_hashes(prints)
    colours = np.frombuffer(b"".join(prints), np.uint8).reshape(-1, EDGE * EDGE * 3)
    colours = colours.astype(np.int16)
    for word in range(_WORDS):
        order = np.argsort(hashes[:, word], kind="stable")
        words = hashes[order, word]
        # in this order those that share the word follow each other: compare each with the next,
        # then with the one after it, until no pair is left that shares it
        left, apart = np.arange(len(prints)), 0
        while len(left):
            apart += 1
            left = left[left + apart < len(prints)]
            left = left[words[left] == words[left + apart]]
            first, second = order[left], order[left + apart]
            apart_yet = leader[first] != leader[second]
            first, second = first[apart_yet], second[apart_yet]
            alike = _alike(hashes, colours, first, second)
            _join(leader, first[alike], second[alike])
    return leader


def _alike(
    hashes: np.ndarray, colours: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Which of the pairs of indices are images that look the same: bool [pairs]."""
    different = np.bitwise_count(hashes[first] ^ hashes[second]).sum(axis=1, dtype=np.int32)
    either = np.bitwise_count(hashes[first] | hashes[second]).sum(axis=1, dtype=np.int32)
    alike = (different <= MAX_BITS) & (4 * different <= either)
    # colours are many times more to compare, so only where the hashes agree
    largest = np.abs(colours[first[alike]] - colours[second[alike]]).max(axis=1, initial=0)
    alike[alike] = largest <= MAX_COLOUR
    return alike


def _join(leader: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Make one group of the groups of each pair; `leader` is changed."""
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((int(leader[i]), int(leader[j])))
        if low != high:
            leader[leader == high] = low
